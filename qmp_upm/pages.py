# SPDX-License-Identifier: GPL-2.0-or-later
"""Sets of page frames, by region. Backed by compressed bitmaps; no operation walks single pages."""

from collections.abc import Iterator
from typing import NamedTuple, Self

from pyroaring import BitMap

PAGE_BYTES = 4096


class Range(NamedTuple):
    """A run of pages: ``region`` by number, ``offset`` in it and ``size`` in bytes."""

    region: int
    offset: int
    size: int


def _runs(pages: BitMap) -> Iterator[tuple[int, int]]:
    """First page and number of pages of each run, from the bits that have no neighbour."""
    firsts = pages - pages.shift(1)
    lasts = pages - (pages.shift(-1))
    for first, last in zip(firsts, lasts, strict=True):
        yield first, last - first + 1


class PageSet:
    """A mutable set of pages of several regions."""

    def __init__(self, regions: dict[int, BitMap] | None = None) -> None:
        self._regions = {} if regions is None else regions

    @classmethod
    def of(cls, *ranges: Range) -> Self:
        """The pages of these ranges."""
        pages = cls()
        for r in ranges:
            pages.add(r)
        return pages

    def add(self, r: Range) -> None:
        """Put a range in."""
        first = r.offset // PAGE_BYTES
        self._regions.setdefault(r.region, BitMap()).add_range(first, first + r.size // PAGE_BYTES)

    def remove(self, r: Range) -> int:
        """Take a range out; returns the bytes of it that were in."""
        pages = self._regions.get(r.region)
        if not pages:
            return 0
        first = r.offset // PAGE_BYTES
        end = first + r.size // PAGE_BYTES
        count = pages.range_cardinality(first, end)
        if count:
            pages.remove_range(first, end)
        return int(count) * PAGE_BYTES

    @property
    def bytes(self) -> int:
        """Bytes of all pages in the set."""
        return sum(len(pages) for pages in self._regions.values()) * PAGE_BYTES

    def ranges(self) -> Iterator[Range]:
        """The set as runs, merged, in order of region and offset."""
        for region in sorted(self._regions):
            for first, count in _runs(self._regions[region]):
                yield Range(region, first * PAGE_BYTES, count * PAGE_BYTES)

    def first(self, size: int) -> "PageSet":
        """The first pages of the set, ``size`` bytes rounded up to a page, or all of it."""
        left = -(-size // PAGE_BYTES)
        taken: dict[int, BitMap] = {}
        for region in sorted(self._regions):
            if left <= 0:
                break
            pages = self._regions[region]
            taken[region] = pages[:left] if left < len(pages) else pages.copy()
            left -= len(taken[region])
        return PageSet(taken)

    def copy(self) -> "PageSet":
        """A set of its own with the same pages."""
        return PageSet({region: pages.copy() for region, pages in self._regions.items()})

    def __ior__(self, other: "PageSet") -> Self:
        for region, pages in other._regions.items():
            if region in self._regions:
                self._regions[region] |= pages
            else:
                self._regions[region] = pages.copy()
        return self

    def __isub__(self, other: "PageSet") -> Self:
        for region, pages in other._regions.items():
            if region in self._regions:
                self._regions[region] -= pages
        return self

    def __and__(self, other: "PageSet") -> "PageSet":
        mine, theirs = self._regions, other._regions
        return PageSet({region: mine[region] & theirs[region] for region in mine.keys() & theirs})

    def __bool__(self) -> bool:
        return any(self._regions.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageSet) and list(self.ranges()) == list(other.ranges())

    __hash__ = None  # type: ignore[assignment] # mutable

    def __repr__(self) -> str:
        return f"PageSet({self.bytes} bytes)"
