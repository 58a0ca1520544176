# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures what a discard costs on this host: the punch, and the fault and zeroing that may follow.

The shared copy is a memfd, the private one a guest_memfd of a VM without processors, where KVM
makes one. Ranges of 4 KiB to 2 MiB are written, punched and written again; sizes and backings take
turns in random order, so that all suffer alike from what else the host does. A line through medians
gives the price of a call and of each page. What a guest adds (mappings of its own to zap, and what
a confidential processor does at each) is not in it.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from qmp_upm.errors import MeasureError
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.prices import Prices

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Pages of the ranges."""
CALLS = 8
"""Ranges that are punched one after the other for one value."""
ASSUMED_CONVERSION = 2e-6
"""An exit and the ioctl, in seconds, where KVM has no attributes to set. Not measured."""

# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
# linux/kvm.h; the flags of a guest_memfd that may be mapped are of Linux 6.18.
_CREATE_VM, _CHECK_EXTENSION, _CREATE_GUEST_MEMFD = 0xAE01, 0xAE03, 0xC040AED4
_CAP_GUEST_MEMFD, _MMAP, _INIT_SHARED = 234, 1, 2

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Backing:
    """One kind of memory, mapped at ``address``; SIZES[-1] * CALLS pages."""

    name: str
    fd: int
    address: int


@dataclass(frozen=True)
class Fit:
    """Seconds for one kind of memory, and how sure they are.

    ``spread``: half of what lies between the quartiles, relative to the median, of the worst size.
    ``punch_s``: medians by number of pages.
    """

    call_s: float
    page_s: float
    refault_s: float
    spread: float
    punch_s: dict[int, float]


class _Libc:
    """The three calls that are timed, straight from libc."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fallocate = libc.fallocate64
        self.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        self.nothing = libc.abs

    def punch(self, backing: Backing, offset: int, size: int) -> None:
        if self.fallocate(backing.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size):
            code = ctypes.get_errno()
            raise MeasureError(
                f"punching a hole in a {backing.name}: {os.strerror(code)}",
                hint="run it as a user who may use /dev/kvm, on the host's own kernel",
            )


def measure(rounds: int, random: Random, clock: Callable[[], int]) -> dict[str, Fit]:
    """Prices by kind of memory. ``clock`` in nanoseconds. MeasureError if no memfd works."""
    libc = _Libc()
    overhead = _call_overhead(libc, clock)
    with _backings() as backings:
        jobs = [(backing, pages) for backing in backings for pages in SIZES]
        values: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for _ in range(rounds):
            random.shuffle(jobs)
            for backing, pages in jobs:
                value = _one(libc, backing, pages, clock, overhead)
                values.setdefault((backing.name, pages), []).append(value)
        return {b.name: _fit({n: np.array(values[b.name, n]) for n in SIZES}) for b in backings}


def prices_of(fits: dict[str, Fit], held_gib_second: float) -> Prices:
    """One price for both copies: a page that goes there and back discards each once."""
    kinds = fits.values()
    return Prices(
        conversion=ASSUMED_CONVERSION,
        discard_call=sum(fit.call_s for fit in kinds) / len(kinds),
        discard_page=sum(fit.page_s for fit in kinds) / len(kinds),
        refault_page=sum(fit.refault_s for fit in kinds) / len(kinds),
        held_gib_second=held_gib_second,
    )


def _call_overhead(libc: _Libc, clock: Callable[[], int]) -> float:
    """Nanoseconds that Python needs for a call of nothing."""
    count, best = 200, float("inf")
    for _ in range(20):
        start = clock()
        for _ in range(count):
            libc.nothing(0)
        best = min(best, (clock() - start) / count)
    return best


def _one(
    libc: _Libc, backing: Backing, pages: int, clock: Callable[[], int], overhead: float
) -> tuple[float, float]:
    """Seconds of a punch of so many pages, and of a page's fault and zeroing after it."""
    size = pages * PAGE_BYTES
    offsets = range(0, CALLS * size, size)
    ctypes.memset(backing.address, 1, CALLS * size)
    start = clock()
    ctypes.memset(backing.address, 1, CALLS * size)
    warm = clock() - start
    start = clock()
    for offset in offsets:
        libc.punch(backing, offset, size)
    punched = (clock() - start) / CALLS - overhead
    start = clock()
    ctypes.memset(backing.address, 1, CALLS * size)
    fault = (clock() - start - warm) / (CALLS * pages)
    return max(punched, 0.0) / 1e9, max(fault, 0.0) / 1e9


def _fit(values: dict[int, Floats]) -> Fit:
    """A line through the medians, each as far off as its share of the value counts."""
    pages = np.array(list(values), dtype=float)
    low, punch, high = np.array(
        [np.quantile(v[:, 0], (0.25, 0.5, 0.75)) for v in values.values()]
    ).T
    page_s, call_s = np.polyfit(pages, punch, 1, w=1 / punch)
    refault = float(np.median([np.median(v[:, 1]) for v in values.values()]))
    return Fit(
        call_s=max(float(call_s), 0.0),
        page_s=max(float(page_s), 0.0),
        refault_s=refault,
        spread=float(((high - low) / 2 / punch).max()),
        punch_s=dict(zip(values, punch.tolist(), strict=True)),
    )


@contextmanager
def _backings() -> Iterator[list[Backing]]:
    size = SIZES[-1] * CALLS * PAGE_BYTES
    made: list[tuple[str, int]] = []
    maps: list[mmap.mmap] = []
    vm = _make_vm()
    try:
        made.append(("memfd", os.memfd_create("qmp-upm-calibrate")))
        os.ftruncate(made[0][1], size)
        guest = _make_guest_memfd(vm, size) if vm is not None else None
        if guest is not None:
            made.append(("guest_memfd", guest))
        maps += [mmap.mmap(fd, size) for _, fd in made]
        addresses = [ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in maps]
        yield [Backing(*pair, address) for pair, address in zip(made, addresses, strict=True)]
    finally:
        for m in maps:
            m.close()
        for fd in [fd for _, fd in made] + ([] if vm is None else [vm]):
            os.close(fd)


def _make_vm() -> int | None:
    """A VM, or None where there is no KVM for us."""
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return int(fcntl.ioctl(kvm, _CREATE_VM, 0))
    except OSError:
        return None
    finally:
        os.close(kvm)


def _make_guest_memfd(vm: int, size: int) -> int | None:
    """A guest_memfd that can be mapped, or None where KVM makes none."""
    if not fcntl.ioctl(vm, _CHECK_EXTENSION, _CAP_GUEST_MEMFD):
        return None
    arguments = struct.pack("<QQ48x", size, _MMAP | _INIT_SHARED)
    try:
        return int(fcntl.ioctl(vm, _CREATE_GUEST_MEMFD, bytearray(arguments)))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP):
            return None
        raise MeasureError(
            f"KVM made no guest_memfd: {error.strerror}", hint="close other VMs, or try again"
        ) from error
