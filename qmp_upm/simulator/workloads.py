# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversions of guests as they are known to behave, made from a seed.

Numbers and sizes of conversions are public figures of firmware and Linux, said at each workload;
what no figure tells (times within a boot, places in RAM) is an assumption, said too. Every workload
ends ten minutes after its start, as the guest of an operator goes on when it has booted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qmp_upm.errors import ConfigError
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.records import RECORD, Records
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.units import NSEC

RAM_BYTES = 4 << 30
"""Of every guest here."""
END_NS = 600 * NSEC
REGION = 1
MIB = 1 << 20

Ints = NDArray[np.int64]
Generator = np.random.Generator


def ovmf(rng: Generator) -> Records:
    """Firmware before December 2022: a conversion there and back for each DMA transaction.

    5,100 transactions, 5,080 of them below 32 KiB (published when the firmware was mended), over a
    few hot pages. Assumed: the firmware allocates from the top down, so that buffers end at one
    place, or below another one that is in use; one to seven pages; half a millisecond for a
    transfer, a millisecond from one to the next, and twelve pauses of half a second.
    """
    count, large, top = 5100, 20, 256
    pages = np.minimum(rng.geometric(0.6, count), 7)
    pages[rng.choice(count, large, replace=False)] = rng.integers(8, 65, large)
    offset = top - pages - rng.choice([0, 1, 2, 4, 7], count, p=[0.8, 0.1, 0.05, 0.03, 0.02])
    pause_s = rng.exponential(0.0010, count)
    pause_s[rng.choice(count, 12, replace=False)] += 0.5
    share_s = np.cumsum(pause_s)
    transfer_s = np.minimum(rng.exponential(0.0005, count), 0.9 * np.append(pause_s[1:], 1.0))
    return _there_and_back(offset, pages, share_s, share_s + transfer_s)


def ovmf_pool(rng: Generator) -> Records:
    """Firmware since December 2022: 17 ranges, 5.5 MiB, shared once and back once.

    Assumed: shared within two seconds as drivers start, and back together when the operating system
    takes over, at the fifth.
    """
    count, total = 17, 5 * MIB // PAGE_BYTES + 128
    pages = rng.multinomial(total - count, np.full(count, 1 / count)) + 1
    offset = np.cumsum(pages + 16) - pages
    share_s = np.sort(rng.uniform(0, 2, count))
    return _there_and_back(offset, pages, share_s, 5 + np.arange(count) * 1e-4)


def swiotlb(rng: Generator) -> Records:  # noqa: ARG001 - every workload is made alike
    """Linux: one block of 6 % of RAM, between 64 MiB and 1 GiB, shared for ever."""
    size = min(max(RAM_BYTES * 6 // 100, 64 * MIB), 1 << 30) // (2 * MIB) * (2 * MIB)
    pages = np.array([size // PAGE_BYTES])
    return _records(np.array([RAM_BYTES // PAGE_BYTES // 4]), pages, np.zeros(1), np.zeros(1))


def accept(rng: Generator) -> Records:
    """A guest accepts all its RAM as private, in ranges of 2 MiB as TDX does, on one processor.

    Assumed: 2 GiB a second.
    """
    count = RAM_BYTES // (2 * MIB)
    time_s = np.cumsum(rng.uniform(0.5, 1.5, count)) * 2 * MIB / (2 << 30)
    pages = np.full(count, 512)
    return _records(np.arange(count) * 512, pages, np.ones(count), time_s)


def balloon(rng: Generator) -> Records:
    """A balloon shares random single pages and gives them back much later, in another order.

    Assumed: 64 MiB within five seconds, and back after five minutes.
    """
    count = 64 * MIB // PAGE_BYTES
    offset = rng.choice(RAM_BYTES // PAGE_BYTES, count, replace=False)
    share_s = np.sort(rng.uniform(0, 5, count))
    return _there_and_back(offset, np.ones(count, int), share_s, 300 + rng.uniform(0, 5, count))


def hostile(rng: Generator) -> Records:
    """A guest that flips as fast as it can over as much as it can: a page at a time, at random.

    Half a million conversions a second for two seconds, over 1 GiB: more than QEMU lets through
    when it discards at each, less than when it discards at none.
    """
    count, area = 1_000_000, (1 << 30) // PAGE_BYTES
    offset = rng.integers(0, area, count)
    # Each page alternates: its first visit shares it.
    order = np.argsort(offset, kind="stable")
    ordered = offset[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    visit = np.empty(count, dtype=np.int64)
    visit[order] = np.arange(count) - np.repeat(starts, np.diff(np.append(starts, count)))
    return _records(offset, np.ones(count, int), visit % 2, np.arange(count) / 500_000)


def random_trace(rng: Generator) -> Records:
    """Anything: up to twelve ranges of any size, each with return times of a scale of its own.

    Each flips 30 to 120 times, at intervals without memory whose mean is from 10 µs to 10 s.
    """
    parts = []
    for slot in range(int(rng.integers(1, 13))):
        flips = int(rng.integers(30, 121))
        gap_s = 10 ** rng.uniform(-5, 1) * rng.exponential(1.0, flips)
        pages = np.full(flips, int(2 ** rng.uniform(0, 10)))
        offset = np.full(flips, slot * 4096)
        private = (np.arange(flips) + int(rng.integers(2))) % 2
        parts.append(_records(offset, pages, private, np.cumsum(gap_s) + rng.uniform(0, 10)))
    records = np.concatenate(parts)
    return records[np.argsort(records["time_ns"], kind="stable")]


@dataclass(frozen=True)
class Workload:
    """A generator, by the name that ``simulate`` takes."""

    make: Callable[[Generator], Records]

    @property
    def summary(self) -> str:
        """The first line of what it is."""
        return (self.make.__doc__ or "").split("\n")[0]


WORKLOADS = {
    "ovmf": Workload(ovmf),
    "ovmf-pool": Workload(ovmf_pool),
    "swiotlb": Workload(swiotlb),
    "accept": Workload(accept),
    "balloon": Workload(balloon),
    "hostile": Workload(hostile),
    "random": Workload(random_trace),
}


def make_workload(name: str, seed: int = 0) -> Timeline:
    """The workload of this name, the same for the same seed. ConfigError names those there are."""
    if name not in WORKLOADS:
        raise ConfigError(
            f"there is no workload {name!r}", hint=f"workloads: {', '.join(WORKLOADS)}"
        )
    return Timeline(WORKLOADS[name].make(np.random.default_rng(seed)), END_NS)


def _there_and_back(offset: Ints, pages: Ints, share_s: np.ndarray, back_s: np.ndarray) -> Records:
    """Each range to shared, and to private again, all in order of time."""
    there = _records(offset, pages, np.zeros(len(offset)), share_s)
    back = _records(offset, pages, np.ones(len(offset)), back_s)
    records = np.concatenate([there, back])
    return records[np.argsort(records["time_ns"], kind="stable")]


def _records(offset: Ints, pages: Ints, private: np.ndarray, time_s: np.ndarray) -> Records:
    """``offset`` and ``pages`` in pages."""
    records = np.zeros(len(offset), dtype=RECORD)
    records["region"], records["count"] = REGION, 1
    records["offset"], records["size"] = offset * PAGE_BYTES, pages * PAGE_BYTES
    records["private"], records["time_ns"] = private, (time_s * NSEC).astype(np.int64)
    return records
