# SPDX-License-Identifier: GPL-2.0-or-later
"""What a batch of conversions comes to, in bulk and exactly.

The ranges of a batch are cut at each other's ends into segments, so that every page of a segment
has had the same conversions. Within a segment each conversion but the first finds what the one
before it left, and only the last one counts for what is stale now. So a batch is known by the pages
of the first and of the last conversions in each direction, and what happened in between.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from qmp_upm.pages import PAGE_BYTES, Ints, PageSet, Runs, distinct
from qmp_upm.protocol import Copy
from qmp_upm.records import Records

RETURN = np.dtype(
    [
        ("region", "<u4"),
        ("first", "<i8"),
        ("pages", "<i8"),
        ("private", "u1"),
        ("away_ns", "<i8"),
        ("kept", "u1"),
        ("weight", "<f4"),
    ]
)
"""A run that flipped back, to private or to shared: how long it had been away, and whether its old
copy was still there.

``weight``: how many such runs it stands for, where only a sample was looked at.
"""

Returns = NDArray[np.void]
"""A one-dimensional array of RETURN."""

REGION_SHIFT = 32
"""Page numbers have 32 bits, so that region and page make one key."""
OVERLAP_MOST = 1 << 16
"""Conversions of segments looked at in one go; batches whose ranges overlap more are halved."""


def no_sets() -> dict[Copy, PageSet]:
    """An empty set for each copy."""
    return {copy: PageSet() for copy in Copy}


def make_returns(
    runs: Runs, private: Ints | bool, away_ns: Ints | int, kept: Ints | bool
) -> Returns:
    """Rows of RETURN, each for itself."""
    rows = np.empty(len(runs.region), dtype=RETURN)
    rows["region"], rows["first"], rows["pages"] = runs
    rows["private"], rows["away_ns"], rows["kept"], rows["weight"] = private, away_ns, kept, 1.0
    return rows


@dataclass
class Digest:
    """``first[copy]``, ``last[copy]``: pages whose first or last conversion made ``copy`` live.

    ``entered[copy]``: pages whose ``copy`` is stale after it. ``deferred_bytes`` became stale,
    ``reused_bytes`` of those were still there when they were converted back within the batch.
    ``returns``: the flips within the batch. ``begin_ns`` to ``end_ns``: its records' times.
    """

    first: dict[Copy, PageSet] = field(default_factory=no_sets)
    last: dict[Copy, PageSet] = field(default_factory=no_sets)
    entered: dict[Copy, PageSet] = field(default_factory=no_sets)
    deferred_bytes: int = 0
    reused_bytes: int = 0
    returns: Returns = field(default_factory=lambda: np.empty(0, dtype=RETURN))
    begin_ns: int = 0
    end_ns: int = 0

    def then(self, later: "Digest") -> "Digest":
        """Both, one after the other."""
        reused = self.reused_bytes + later.reused_bytes
        first, last, entered = no_sets(), no_sets(), no_sets()
        returns = [self.returns, later.returns]
        for copy in Copy:
            reused += self.entered[copy].common_bytes(later.first[copy])
            flipped = self.last[copy.other] & later.first[copy]
            kept = flipped & self.entered[copy]
            flipped -= kept
            away_ns = max(0, later.begin_ns - self.end_ns)
            returns += [make_returns(kept.runs(), copy is Copy.PRIVATE, away_ns, kept=True)]
            returns += [make_returns(flipped.runs(), copy is Copy.PRIVATE, away_ns, kept=False)]
            first[copy] = later.first[copy].copy()
            last[copy], entered[copy] = self.last[copy].copy(), self.entered[copy].copy()
            for direction in Copy:
                first[copy] -= self.first[direction]
                last[copy] -= later.last[direction]
                entered[copy] -= later.last[direction]
            first[copy] |= self.first[copy]
            last[copy] |= later.last[copy]
            entered[copy] |= later.entered[copy]
        return Digest(
            first,
            last,
            entered,
            self.deferred_bytes + later.deferred_bytes,
            reused,
            np.concatenate(returns),
            self.begin_ns,
            later.end_ns,
        )


@dataclass(frozen=True)
class _Cut:
    """Who converts which segment, by segment and then in order: by index, ``row`` and ``segment``.

    Segments are runs from ``first``, region and page in one, of so many ``pages``.
    """

    row: Ints
    segment: Ints
    first: Ints
    pages: Ints


def digest(records: Records) -> Digest:
    """What these conversions, in their order, come to."""
    if not len(records):
        return Digest()
    return reduce(Digest.then, (_digest_part(part, cut) for part, cut in _parts(records)))


def _parts(records: Records) -> Iterator[tuple[Records, _Cut]]:
    """The records in pieces of bounded work, however a hostile guest's ranges overlap."""
    pages = records["size"] // PAGE_BYTES
    first = (records["region"].astype(np.int64) << REGION_SHIFT) + records["offset"] // PAGE_BYTES
    order = np.argsort(first)
    begins, ends = first[order], (first + pages)[order]
    if (begins[1:] >= ends[:-1]).all():
        yield records, _Cut(order, np.arange(len(order)), begins, pages[order])
        return
    points = distinct(np.concatenate((begins, ends)))
    low, spans = np.empty_like(order), np.empty_like(order)
    low[order] = np.searchsorted(points, begins)  # in order they are found several times as fast
    spans[order] = np.searchsorted(points, ends) - low[order]
    if int(spans.sum()) <= max(OVERLAP_MOST, 4 * len(records)):
        yield records, _cut(points, low, spans)
        return
    middle = len(records) // 2
    yield from _parts(records[:middle])
    yield from _parts(records[middle:])


def _cut(points: Ints, low: Ints, spans: Ints) -> _Cut:
    """Segments between all ``points``; each record has ``spans`` of them, from ``low`` on."""
    row = np.repeat(np.arange(len(low)), spans)
    segment = np.repeat(low - np.cumsum(spans) + spans, spans) + np.arange(len(row))
    # Numbers of 16 bits are sorted several times as fast.
    order = np.argsort(segment.astype(np.min_scalar_type(len(points))), kind="stable")
    return _Cut(row[order], segment[order], points[:-1], np.diff(points))


def _digest_part(records: Records, cut: _Cut) -> Digest:
    row, segment = cut.row, cut.segment
    private = records["private"][row] == 1
    deferred = records["deferred"][row] == 1
    time_ns = records["time_ns"][row]
    follows = np.zeros(len(row), dtype=bool)
    follows[1:] = segment[1:] == segment[:-1]
    is_last = np.ones(len(row), dtype=bool)
    is_last[:-1] = ~follows[1:]
    before = np.arange(len(row)) - 1
    flips = follows & (private != private[before])
    kept = flips & deferred[before]

    def runs(which: NDArray[np.bool_]) -> Runs:
        chosen = segment[which]
        first = cut.first[chosen]
        return Runs(first >> REGION_SHIFT, first & ((1 << REGION_SHIFT) - 1), cut.pages[chosen])

    def by_direction(which: NDArray[np.bool_]) -> dict[Copy, PageSet]:
        return {
            Copy.PRIVATE: PageSet.of_runs(runs(which & private)),
            Copy.SHARED: PageSet.of_runs(runs(which & ~private)),
        }

    last = by_direction(is_last)
    first = by_direction(~follows) if follows.any() else last
    stale = last if deferred.all() else by_direction(is_last & deferred)
    away_ns = np.maximum(time_ns[flips] - time_ns[before][flips], 0)
    return Digest(
        first,
        last,
        {copy: stale[copy.other] for copy in Copy},
        int(records["size"][records["deferred"] == 1].sum()),
        int(runs(kept).pages.sum()) * PAGE_BYTES,
        make_returns(runs(flips), private[flips], away_ns, kept[flips]),
        int(records["time_ns"].min()),
        int(records["time_ns"].max()),
    )
