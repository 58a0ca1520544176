# SPDX-License-Identifier: GPL-2.0-or-later
"""A model of the plugin's ledger and of a conversion: plugin/ledger.c and convert.c.

No I/O, and no time but from the clock that it is given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pyroaring import BitMap

from qmp_upm.pages import PAGE_BYTES
from qmp_upm.protocol import Copy
from qmp_upm.testing.ring import FakeRing

CHUNK_PAGES = 512
"""The most that one discard takes."""
BUCKETS = 40
CONVERT_NS = 1_000
"""How long a conversion is said to take."""
DISCARD_NS = 20_000
"""How long the discard of a chunk is said to take."""
BY_COPY = (
    "conversions-to",
    "converted-bytes-to",
    "deferred-bytes",
    "reused-bytes",
    "inline-bytes",
    "requested-bytes",
    "failsafe-bytes",
    "superseded-bytes",
    "forgotten-bytes",
)
SINGLE = (
    "left-alone-bytes",
    "skipped-bytes",
    "over-budget-bytes",
    "discards",
    "failed-discards",
    "lease-expiries",
    "commands",
    "events",
)
"""Counters in the order of plugin/status.c."""


@dataclass
class FakeRegion:
    """One backing of guest RAM with its stale pages. ``gpa``: where its only slot is."""

    id: int
    name: str
    pages: int
    gpa: int
    stale: dict[Copy, BitMap] = field(default_factory=lambda: {copy: BitMap() for copy in Copy})

    def next_run(self, copy: Copy, at: int, end: int, most: int) -> tuple[int, int] | None:
        """The first run of stale pages in [at, end), ``most`` at most: its first page and end."""
        pages = self.stale[copy]
        first = next(pages.iter_equal_or_larger(at), None)
        if first is None or first >= end:
            return None
        low, high = first + 1, min(first + most, end, self.pages)
        while low < high:
            middle = (low + high + 1) // 2
            if pages.range_cardinality(first, middle) == middle - first:
                low = middle
            else:
                high = middle - 1
        return first, low


class FakeLedger:
    """Regions, stale pages, counters and records of one VM, as the plugin keeps them.

    ``changed`` is called after each conversion. ``failing``: the error that discards meet while it
    is set. ``over_budget``: a conversion found no room since somebody last reset it.
    """

    def __init__(
        self, regions: Mapping[str, int], ring: FakeRing, clock_ns: Callable[[], int]
    ) -> None:
        self.ring = ring
        self.regions: dict[int, FakeRegion] = {}
        self.counters = {f"{name}-{copy}": 0 for name in BY_COPY for copy in Copy}
        self.counters |= dict.fromkeys(SINGLE, 0)
        self.latency_ns = {"convert": [0] * BUCKETS, "discard": [0] * BUCKETS}
        self.deferring = dict.fromkeys(Copy, False)
        self.budget = 0
        self.stale_pages = self.peak_pages = 0
        self.failing: str | None = None
        self.over_budget = False
        self.changed: Callable[[], None] = lambda: None
        self._clock_ns = clock_ns
        self._next_id, self._next_gpa = 1, 0
        for name, size in regions.items():
            self.open_region(name, size)

    def open_region(self, name: str, size: int) -> int:
        """QEMU makes a backing of so many bytes; returns its number."""
        region = FakeRegion(self._next_id, name, size // PAGE_BYTES, self._next_gpa)
        self.regions[region.id] = region
        self._next_id += 1
        self._next_gpa += size
        return region.id

    def close_region(self, region_id: int) -> None:
        """QEMU closes a backing: its copies go with it."""
        region = self.regions[region_id]
        for copy in Copy:
            gone = self._remove(region, copy, 0, region.pages)
            self.counters[f"forgotten-bytes-{copy}"] += gone * PAGE_BYTES
        del self.regions[region_id]

    def convert(
        self, region_id: int, offset: int, size: int, *, to_private: bool, count: int = 1
    ) -> None:
        """The guest converts a range, in ``count`` steps of equal size, one after the other."""
        region = self.regions[region_id]
        live = Copy.PRIVATE if to_private else Copy.SHARED
        left = live.other
        first, end = offset // PAGE_BYTES, (offset + size) // PAGE_BYTES
        more = end - first - int(region.stale[left].range_cardinality(first, end))
        if count > 1 and self.deferring[left] and not self._fits(more):
            for part in range(offset, offset + size, size // count):
                self.convert(region_id, part, size // count, to_private=to_private)
            return
        self.counters[f"reused-bytes-{live}"] += self._remove(region, live, first, end) * PAGE_BYTES
        self.counters[f"conversions-to-{live}"] += count
        self.counters[f"converted-bytes-to-{live}"] += size
        self.latency_ns["convert"][CONVERT_NS.bit_length() - 1] += count
        deferred = self._may_defer(left, more)
        if deferred:
            region.stale[left].add_range(first, end)
            self.stale_pages += more
            self.peak_pages = max(self.peak_pages, self.stale_pages)
            self.counters[f"deferred-bytes-{left}"] += more * PAGE_BYTES
        else:
            self._discard_inline(region, left, first, end, count)
        record = [region_id, offset, size, int(to_private), int(deferred), self._clock_ns(), count]
        self.ring.append(record)
        self.changed()

    def _fits(self, more_pages: int) -> bool:
        return self.stale_pages + more_pages <= self.budget // PAGE_BYTES

    def _may_defer(self, copy: Copy, more_pages: int) -> bool:
        if not self.deferring[copy]:
            return False
        if self._fits(more_pages):
            return True
        self.counters["over-budget-bytes"] += more_pages * PAGE_BYTES
        self.over_budget = True
        return False

    def _discard_inline(
        self, region: FakeRegion, copy: Copy, first: int, end: int, count: int
    ) -> None:
        again = self._remove(region, copy, first, end)
        self.counters[f"superseded-bytes-{copy}"] += again * PAGE_BYTES
        self.counters[f"inline-bytes-{copy}"] += (end - first) * PAGE_BYTES
        self._count_discards(count * -(-(end - first) // (count * CHUNK_PAGES)))

    def _count_discards(self, number: int) -> None:
        self.counters["discards"] += number
        self.latency_ns["discard"][DISCARD_NS.bit_length() - 1] += number

    def _remove(self, region: FakeRegion, copy: Copy, first: int, end: int) -> int:
        pages = region.stale[copy]
        count = int(pages.range_cardinality(first, end))
        if count:
            pages.remove_range(first, end)
            self.stale_pages -= count
        return count

    def stale(self, copy: Copy) -> int:
        """Stale bytes of a copy."""
        return sum(len(region.stale[copy]) for region in self.regions.values()) * PAGE_BYTES

    def excess(self) -> Copy | None:
        """A copy of which something is stale that should not be there, whatever the daemon says."""
        for copy in Copy if self.stale_pages else ():
            if (not self.deferring[copy] or not self._fits(0)) and self.stale(copy):
                return copy
        return None

    def discard(self, region_id: int, copy: Copy, first: int, end: int, why: str) -> int | None:
        """Discard the first chunk in [first, end); the page behind it, or None if nothing is stale.

        Its bytes are counted as ``<why>-bytes``. OSError while discards fail.
        """
        region = self.regions.get(region_id)
        run = region and region.next_run(copy, first, end, CHUNK_PAGES)
        if not region or not run:
            return None
        if self.failing is not None:
            self.counters["failed-discards"] += 1
            raise OSError(self.failing)
        gone = self._remove(region, copy, *run)
        self.counters[f"{why}-bytes-{copy}"] += gone * PAGE_BYTES
        self._count_discards(1)
        return run[1]
