# SPDX-License-Identifier: GPL-2.0-or-later
"""Sets of page frames, by region. Backed by compressed bitmaps; no operation walks single pages."""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

PAGE_BYTES = 4096
LONG_PAGES = 64
"""From here on a run goes into a bitmap as a range; shorter ones go page by page, all at once."""
CONTAINER_BYTES = 48
"""What a container costs beside its content: its entries in tables, and malloc's own."""
FEW_PAGES = 1 << 16
"""Up to so many pages runs are found among their numbers, in more among the bits."""

Ints = NDArray[np.int64]


class Range(NamedTuple):
    """A run of pages: ``region`` by number, ``offset`` in it and ``size`` in bytes."""

    region: int
    offset: int
    size: int


class Runs(NamedTuple):
    """Runs of pages in bulk: arrays of one length, of region numbers, first pages and pages."""

    region: Ints
    first: Ints
    pages: Ints


def distinct(values: Ints) -> Ints:
    """These values in order, each once. ``np.unique`` loads a module first, and then is slower."""
    ordered = np.sort(values)
    found: Ints = ordered[np.append([True], ordered[1:] != ordered[:-1])[: len(ordered)]]
    return found


def _from_runs(first: Ints, pages: Ints) -> BitMap:
    """A bitmap of runs in any order; they may overlap."""
    long = pages >= LONG_PAGES
    short_first, short_pages = first[~long], pages[~long]
    ends = np.cumsum(short_pages)
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.repeat(short_first - ends + short_pages, short_pages) + np.arange(total)
    # An array of this type is what pyroaring takes in one call.
    flat = array("I")
    flat.frombytes(numbers.astype(np.uint32).tobytes())
    bitmap = BitMap(flat)
    for start, count in zip(first[long].tolist(), pages[long].tolist(), strict=True):
        bitmap.add_range(start, start + count)
    return bitmap


def _to_runs(bitmap: BitMap) -> tuple[Ints, Ints]:
    """First page and number of pages of each run."""
    if len(bitmap) <= FEW_PAGES:
        numbers = np.frombuffer(bitmap.to_array(), dtype=np.uint32).astype(np.int64)
        after = np.flatnonzero(numbers[1:] != numbers[:-1] + 1) + 1
        bounds = np.concatenate(([0], after, [len(numbers)]))
        return numbers[bounds[:-1]], bounds[1:] - bounds[:-1]
    # Runs begin and end at the bits that have no neighbour.
    firsts = np.frombuffer((bitmap - bitmap.shift(1)).to_array(), dtype=np.uint32)
    lasts = np.frombuffer((bitmap - bitmap.shift(-1)).to_array(), dtype=np.uint32)
    return firsts.astype(np.int64), lasts.astype(np.int64) - firsts + 1


class PageSet:
    """A mutable set of pages of several regions."""

    __slots__ = ("_regions",)

    def __init__(self, regions: Mapping[int, BitMap] | None = None) -> None:
        self._regions = {} if regions is None else dict(regions)

    @classmethod
    def of(cls, *ranges: Range) -> Self:
        """The pages of these ranges."""
        pages = cls()
        for r in ranges:
            pages.add(r)
        return pages

    @classmethod
    def of_runs(cls, runs: Runs) -> Self:
        """The pages of these runs, which may overlap and come in any order."""
        if not len(runs.region):
            return cls()
        region = int(runs.region[0])
        if (runs.region == region).all():
            return cls({region: _from_runs(runs.first, runs.pages)})
        parts = {}
        for region in distinct(runs.region).tolist():
            own = runs.region == region
            parts[region] = _from_runs(runs.first[own], runs.pages[own])
        return cls(parts)

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

    def bytes_by_region(self) -> dict[int, int]:
        """Bytes of the pages of each region."""
        return {region: len(pages) * PAGE_BYTES for region, pages in self._regions.items()}

    @property
    def memory_bytes(self) -> int:
        """What the set takes, about: its containers, of 2^16 pages each, and their tables."""
        total = 0
        for pages in self._regions.values():
            about = pages.get_statistics()
            total += about["n_bytes_array_containers"] + about["n_bytes_run_containers"]
            total += about["n_bytes_bitset_containers"]
            total += CONTAINER_BYTES * about["n_containers"]
        return total

    @property
    def regions(self) -> list[int]:
        """Numbers of the regions that it has, or had, pages of."""
        return list(self._regions)

    def drop_regions(self, regions: Iterable[int]) -> None:
        """Take all pages of these regions out."""
        for region in regions:
            self._regions.pop(region, None)

    def common_bytes(self, other: "PageSet") -> int:
        """Bytes of the pages that are in both sets."""
        mine, theirs = self._regions, other._regions  # noqa: SLF001 - of its own kind
        return PAGE_BYTES * sum(
            mine[region].intersection_cardinality(theirs[region])
            for region in mine.keys() & theirs.keys()
        )

    def runs(self) -> Runs:
        """The set as merged runs, in order of region and first page."""
        parts = [(r, *_to_runs(pages)) for r, pages in sorted(self._regions.items()) if pages]
        if not parts:
            return Runs(*(np.empty(0, dtype=np.int64) for _ in range(3)))
        return Runs(
            np.repeat([region for region, _, _ in parts], [len(first) for _, first, _ in parts]),
            np.concatenate([first for _, first, _ in parts]),
            np.concatenate([pages for _, _, pages in parts]),
        )

    def numbers(self) -> Runs:
        """The set page by page, as runs of one: only for sets that are known to be small."""
        parts = [
            (region, np.frombuffer(self._regions[region].to_array(), dtype=np.uint32))
            for region in sorted(self._regions)
        ]
        first = np.concatenate([np.empty(0, dtype=np.int64), *(pages for _, pages in parts)])
        region = np.repeat([r for r, _ in parts], [len(pages) for _, pages in parts])
        return Runs(region.astype(np.int64), first, np.ones_like(first))

    def ranges(self) -> Iterator[Range]:
        """The set as runs, merged, in order of region and offset."""
        runs = self.runs()
        columns = (runs.region, runs.first * PAGE_BYTES, runs.pages * PAGE_BYTES)
        return (Range(*row) for row in zip(*(c.tolist() for c in columns), strict=True))

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
        self.subtract(other)
        return self

    def subtract(self, other: "PageSet") -> None:
        """Take the pages of another set out."""
        for region, pages in other._regions.items():  # noqa: SLF001 - of its own kind
            if region in self._regions:
                self._regions[region] -= pages

    def __and__(self, other: "PageSet") -> "PageSet":
        mine, theirs = self._regions, other._regions
        return PageSet({region: mine[region] & theirs[region] for region in mine.keys() & theirs})

    def __bool__(self) -> bool:
        return any(self._regions.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageSet):
            return NotImplemented
        mine, theirs = self._regions, other._regions
        return {r: p for r, p in mine.items() if p} == {r: p for r, p in theirs.items() if p}

    __hash__ = None  # type: ignore[assignment] # mutable

    def __repr__(self) -> str:
        return f"PageSet({self.bytes} bytes)"
