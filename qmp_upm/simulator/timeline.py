# SPDX-License-Identifier: GPL-2.0-or-later
"""A trace made ready: pages of equal history joined to extents, and who touches which when.

An *extent* is a run of pages that every conversion takes whole or not at all; a *touch* is one
conversion of one extent. All that follows is in arrays over touches, in the order of the records,
so that the engine and the optimum work on whole batches at once, and a conversion of a terabyte
costs no more than one of a page.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from qmp_upm.errors import TraceError
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.records import Records
from qmp_upm.trace import Read, Trace
from qmp_upm.units import NSEC

TOUCHES_MOST = 1 << 25
"""More than that is refused: it would take above 1.5 GiB of memory."""
PUNCH_PAGES = 512
"""Pages of the longest hole punch: CHUNK_PAGES of ``plugin/upm.h``."""
NEVER = np.iinfo(np.int32).max
"""The next touch of an extent that is not touched again."""
DENSE_MOST = 1 << 22
"""Pages of a region up to which a table with an entry for each is the quicker way to sort them."""
_REGION_SHIFT = 32
# Pages have numbers of 31 bits: qmp_upm.records.OFFSET.

Ints = NDArray[np.int64]
Indices = NDArray[np.int32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Extents:
    """Disjoint runs of pages, by region and page."""

    region: Ints
    first: Ints
    pages: Ints

    @cached_property
    def _keys(self) -> Ints:
        return self.region << _REGION_SHIFT | self.first

    def find(self, region: Ints, page: Ints) -> Ints:
        """The extents that these pages are in, by index."""
        keys = region << _REGION_SHIFT | page
        after: Ints = np.searchsorted(self._keys, keys, side="right")
        return after - 1


class Timeline:
    """Conversions from ``start_ns`` to ``end_ns``, and what they touch.

    ``reads``: the daemon's when it was recorded; without them (a generated trace) the simulator
    reads when the daemon would have. Raises TraceError if there is nothing to simulate, or too
    much.
    """

    def __init__(
        self,
        records: Records,
        end_ns: int | None = None,
        reads: tuple[Read, ...] = (),
    ) -> None:
        if not len(records):
            raise TraceError("the trace has no conversions", hint="record while the guest runs")
        self.records = records
        self.reads = reads
        # The guest's processors race between taking the time and the record's place.
        self.time_ns: Ints = np.maximum.accumulate(records["time_ns"].astype(np.int64))
        self.start_ns = int(self.time_ns[0])
        last = max([int(self.time_ns[-1]), *(read.now_ns for read in reads[-1:])])
        self.end_ns = max(last, end_ns or 0)
        self.to_private: Flags = records["private"].astype(bool)
        self.extents, self.touch_extent, self.first_touch = _touches(records)
        counts = np.diff(self.first_touch)
        self.touch_record: Indices = np.repeat(np.arange(len(records), dtype=np.int32), counts)
        self.touch_pages: Ints = self.extents.pages[self.touch_extent]
        self.touch_private: Flags = self.to_private[self.touch_record]
        self.touch_before, self.touch_after = _neighbours(self.touch_extent)
        known = self.touch_before >= 0
        self.touch_returns: Flags = known & (
            self.touch_private[np.where(known, self.touch_before, 0)] != self.touch_private
        )

    @classmethod
    def of_trace(cls, trace: Trace) -> Self:
        """A recorded trace, read when it was read then."""
        return cls(trace.records, reads=trace.reads)

    @property
    def dropped(self) -> int:
        """Records that were lost when it was recorded."""
        return sum(read.dropped for read in self.reads)

    @property
    def conversions(self) -> int:
        """The guest's, which a record may have several of."""
        return int(self.records["count"].sum(dtype=np.int64))

    @property
    def seconds(self) -> float:
        """From the first conversion to the end."""
        return (self.end_ns - self.start_ns) / NSEC

    def touches(self, low: int, high: int) -> slice:
        """The touches of records low to high."""
        return slice(int(self.first_touch[low]), int(self.first_touch[high]))

    @cached_property
    def record_calls(self) -> Ints:
        """Hole punches of each record if nothing is deferred: neighbours were converted singly."""
        count = np.maximum(self.records["count"].astype(np.int64), 1)
        pages: Ints = self.records["size"] // PAGE_BYTES
        calls: Ints = count * -(-pages // (count * PUNCH_PAGES))
        return calls

    @cached_property
    def run_pages(self) -> dict[bool, Ints]:
        """For each extent, the most pages of a hole punch that discards it (key: private).

        There are no more in a row that are ever stale in this copy.
        """
        runs = {}
        for private in (False, True):
            left = np.zeros(len(self.extents.pages), dtype=bool)
            left[self.touch_extent[self.touch_private != private]] = True
            runs[private] = np.minimum(_run_pages(self.extents, left), PUNCH_PAGES)
        return runs


def _touches(records: Records) -> tuple[Extents, Indices, Ints]:
    """The extents, the extent of each touch, and for each record its first touch, plus the end."""
    first = records["offset"].astype(np.int64) // PAGE_BYTES
    end = first + records["size"].astype(np.int64) // PAGE_BYTES
    low, high = np.empty(len(records), dtype=np.int64), np.empty(len(records), dtype=np.int64)
    parts, base = [], 0
    for region in np.unique(records["region"]).tolist():
        mine = records["region"] == region
        bounds, place = _ranked(np.concatenate([first[mine], end[mine]]))
        low[mine], high[mine] = base + place.reshape(2, -1)
        size = len(bounds) - 1
        parts.append((np.full(size, region, dtype=np.int64), bounds[:-1], np.diff(bounds)))
        base += size
    extents = Extents(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    first_touch = np.concatenate([[0], np.cumsum(high - low)])
    total = int(first_touch[-1])
    if total > TOUCHES_MOST:
        raise TraceError(
            f"the trace's ranges overlap in {total} pieces, more than {TOUCHES_MOST}",
            hint="simulate a shorter part of it",
        )
    shift = np.repeat(low - first_touch[:-1], high - low)
    return extents, (np.arange(total) + shift).astype(np.int32), first_touch


def _ranked(values: Ints) -> tuple[Ints, Ints]:
    """The distinct values in order, and where in them each value is."""
    least, most = int(values.min()), int(values.max())
    if most - least > DENSE_MOST:
        bounds, place = np.unique(values, return_inverse=True)
        return bounds, place
    known = np.zeros(most - least + 1, dtype=bool)
    known[values - least] = True
    ranks = np.cumsum(known) - 1
    return np.flatnonzero(known) + least, ranks[values - least]


def _neighbours(touch_extent: Indices) -> tuple[Indices, Indices]:
    """The touch before (-1: none) and after (NEVER: none) each one, of the same extent."""
    before = np.full(len(touch_extent), -1, dtype=np.int32)
    after = np.full(len(touch_extent), NEVER, dtype=np.int32)
    order = np.argsort(touch_extent, kind="stable").astype(np.int32)
    ordered = touch_extent[order]
    same = ordered[1:] == ordered[:-1]
    before[order[1:][same]] = order[:-1][same]
    after[order[:-1][same]] = order[1:][same]
    return before, after


def _run_pages(extents: Extents, chosen: Flags) -> Ints:
    """Pages of the longest row of chosen neighbours that each extent is in; its own if it isn't."""
    joined = np.zeros(len(chosen), dtype=bool)
    joined[1:] = (
        chosen[1:]
        & chosen[:-1]
        & (extents.region[1:] == extents.region[:-1])
        & (extents.first[1:] == extents.first[:-1] + extents.pages[:-1])
    )
    run = np.cumsum(~joined) - 1
    total: Ints = np.bincount(run, weights=extents.pages)[run].astype(np.int64)
    return total
