# SPDX-License-Identifier: GPL-2.0-or-later
"""A model of the plugin's ledger, and of conversions with QEMU's discard after each.

After plugin/convert.c, discard.c and ledger.c. No I/O, and no time but from the clock that it is
given.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pyroaring import BitMap

from qmp_upm.pages import PAGE_BYTES
from qmp_upm.protocol import Copy
from qmp_upm.testing.ring import FakeRing

CHUNK_PAGES = 512
"""The most that one discard takes."""
STRIDE_PAGES = 32 * CHUNK_PAGES
"""Of a longer conversion, what fits the budget is kept in pieces of so many pages."""
FAILURES_MOST = 8
"""After so many discards that failed, one after the other, a region's are QEMU's own."""
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
    """One backing of guest RAM with its stale pages. ``gpa``: where its only slot is.

    ``shared``: the pages that KVM has as shared, at first all; the others are private.
    ``failures``: discards that failed since the last one that did not. ``lost``: the plugin has
    given it up.
    """

    id: int
    name: str
    pages: int
    gpa: int
    backing: str = "memfd"
    stale: dict[Copy, BitMap] = field(default_factory=lambda: {copy: BitMap() for copy in Copy})
    shared: BitMap = field(default_factory=BitMap)
    failures: int = 0
    lost: bool = False

    def __post_init__(self) -> None:
        self.shared.add_range(0, self.pages)

    @property
    def state(self) -> str:
        """As x-upm-query says it."""
        if self.lost:
            return "lost"
        return "failing" if self.failures >= FAILURES_MOST else "followed"

    def moves(self, live: Copy, first: int, end: int) -> BitMap:
        """The pages that a conversion of [first, end) changes; they are changed."""
        if live is Copy.SHARED:
            moved = _pages(first, end) - self.shared
            self.shared.add_range(first, end)
        else:
            moved = _pages(first, end) & self.shared
            self.shared.remove_range(first, end)
        return moved

    def next_run(self, copy: Copy, at: int, end: int, most: int) -> tuple[int, int] | None:
        """The first run of stale pages in [at, end), ``most`` at most: its first page and end."""
        return _run(self.stale[copy], at, min(end, self.pages), most)


class FakeLedger:
    """Regions, stale pages, counters and records of one VM, as the plugin keeps them.

    ``changed`` is called after each conversion. ``failing``: the error that discards meet while it
    is set. ``over_budget``: a conversion found no room since somebody last reset it. ``launching``:
    no processor of the VM has run yet: nobody discards, and what ``convert`` changes is the state
    that the guest begins with.
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
        self.over_budget = self.launching = False
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
        region, live = self.regions[region_id], Copy.PRIVATE if to_private else Copy.SHARED
        if self.launching:
            self._begin_with(region, live, offset // PAGE_BYTES, (offset + size) // PAGE_BYTES)
            return
        steps = 1 if self._is_as_one(region, live, offset, size, count) else count
        for at in range(offset, offset + size, size // steps):
            self._convert(region, live, at, size // steps, count // steps)
        self.changed()

    def _begin_with(self, region: FakeRegion, live: Copy, first: int, end: int) -> None:
        region.moves(live, first, end)
        reused = self._remove(region, live, first, end)
        self.counters[f"reused-bytes-{live}"] += reused * PAGE_BYTES
        if reused:
            self._record(region, live.other, first, end, 0)

    def _is_as_one(
        self, region: FakeRegion, live: Copy, offset: int, size: int, count: int
    ) -> bool:
        """Whether the steps leave what one conversion of the whole range would leave."""
        first, end = offset // PAGE_BYTES, (offset + size) // PAGE_BYTES
        shared = region.shared.range_cardinality(first, end)
        if count == 1 or shared != (end - first if live is Copy.PRIVATE else 0):
            return count == 1
        if self.deferring[live.other]:
            return self._fits(end - first) and region.state == "followed"
        return self.failing is None and end - first <= count * CHUNK_PAGES

    def _convert(self, region: FakeRegion, live: Copy, offset: int, size: int, count: int) -> None:
        left = live.other
        first, end = offset // PAGE_BYTES, (offset + size) // PAGE_BYTES
        moved = region.moves(live, first, end)
        self.counters[f"reused-bytes-{live}"] += self._remove(region, live, first, end) * PAGE_BYTES
        self.counters[f"conversions-to-{live}"] += count
        self.counters[f"converted-bytes-to-{live}"] += size
        self.latency_ns["convert"][CONVERT_NS.bit_length() - 1] += count
        for at in range(first, end, STRIDE_PAGES):
            owed = _pages(at, min(at + STRIDE_PAGES, end))
            self._discard_inline(region, left, moved & owed, owed, count)
        self._record(region, left, first, end, count)

    def _discard_inline(
        self, region: FakeRegion, left: Copy, moved: BitMap, owed: BitMap, count: int
    ) -> None:
        """QEMU's discard of what the guest left. What is not kept, and not stale yet, goes."""
        if moved and self._may_keep(region, left, len(moved)):
            self._enter(region, left, moved)
        owed -= region.stale[left]
        if count > 1 and owed:
            self._punch_inline(region, left, owed, count)
            return
        for low, high in _runs(owed, CHUNK_PAGES):
            self._punch_inline(region, left, _pages(low, high), 1)

    def _may_keep(self, region: FakeRegion, copy: Copy, more_pages: int) -> bool:
        if not self.deferring[copy] or region.state != "followed":
            return False
        if self._fits(more_pages):
            return True
        self.counters["over-budget-bytes"] += more_pages * PAGE_BYTES
        self.over_budget = True
        return False

    def _fits(self, more_pages: int) -> bool:
        return self.stale_pages + more_pages <= self.budget // PAGE_BYTES

    def _enter(self, region: FakeRegion, copy: Copy, pages: BitMap) -> None:
        region.stale[copy] |= pages
        self.stale_pages += len(pages)
        self.peak_pages = max(self.peak_pages, self.stale_pages)
        self.counters[f"deferred-bytes-{copy}"] += len(pages) * PAGE_BYTES

    def _punch_inline(self, region: FakeRegion, copy: Copy, pages: BitMap, calls: int) -> None:
        """A chunk. What can't be discarded is kept while there is room; else QEMU is told."""
        if self._punch(region, calls) is None:
            self.counters[f"inline-bytes-{copy}"] += len(pages) * PAGE_BYTES
        elif region.state == "followed" and self._fits(len(pages)):
            self._enter(region, copy, pages)

    def _punch(self, region: FakeRegion, calls: int = 1) -> str | None:
        """Make discards; the error if they fail."""
        if self.failing is not None:
            self.counters["failed-discards"] += calls
            region.failures += calls
            return self.failing
        self.counters["discards"] += calls
        self.latency_ns["discard"][DISCARD_NS.bit_length() - 1] += calls
        region.failures = 0
        return None

    def _record(self, region: FakeRegion, left: Copy, first: int, end: int, count: int) -> None:
        """Enter the conversion, in runs by what is stale now; the first one counts."""
        stale, to_private = region.stale[left], int(left is Copy.SHARED)
        now_ns, at = self._clock_ns(), first
        for low, high in [*_runs(_pages(first, end) & stale, end), (end, end)]:
            for begin, stop, deferred in ((at, low, 0), (low, high, 1)):
                if begin < stop:
                    offset, size = begin * PAGE_BYTES, (stop - begin) * PAGE_BYTES
                    row = [region.id, offset, size, to_private, deferred, now_ns, count]
                    self.ring.append(row)
                    count = 0
            at = high

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

    def is_excess(self, copy: Copy) -> bool:
        """Whether some of it is stale that should not be there, whatever the daemon says."""
        unwanted = not self.deferring[copy] or not self._fits(0)
        return unwanted and self.stale_pages > 0 and self.stale(copy) > 0

    def excess(self) -> Copy | None:
        """A copy of which that is so."""
        return next((copy for copy in Copy if self.is_excess(copy)), None)

    def discard(self, region_id: int, copy: Copy, first: int, end: int, why: str) -> "Step | None":
        """Discard the first chunk in [first, end); None if nothing is stale there.

        Its bytes are counted as ``<why>-bytes``. While discards fail, it stays stale.
        """
        region = self.regions.get(region_id)
        run = region and region.next_run(copy, first, end, CHUNK_PAGES)
        if not region or not run:
            return None
        if error := self._punch(region):
            return Step(run[1], 0, error)
        gone = self._remove(region, copy, *run) * PAGE_BYTES
        self.counters[f"{why}-bytes-{copy}"] += gone
        return Step(run[1], gone, None)


class Step(NamedTuple):
    """A discard that was made: the page behind it, its bytes, and the error if it failed."""

    end: int
    discarded: int
    error: str | None


def _pages(first: int, end: int) -> BitMap:
    pages = BitMap()
    pages.add_range(first, end)
    return pages


def _run(pages: BitMap, at: int, end: int, most: int) -> tuple[int, int] | None:
    """The first run in [at, end), ``most`` pages at most: its first page and end."""
    first = next(pages.iter_equal_or_larger(at), None)
    if first is None or first >= end:
        return None
    low, high = first + 1, min(first + most, end)
    while low < high:
        middle = (low + high + 1) // 2
        if pages.range_cardinality(first, middle) == middle - first:
            low = middle
        else:
            high = middle - 1
    return first, low


def _runs(pages: BitMap, most: int) -> Iterator[tuple[int, int]]:
    """First page and end of each run, in pieces of ``most`` pages at most."""
    at = 0
    while pages and (run := _run(pages, at, pages.max() + 1, most)):
        yield run
        at = run[1]
