# SPDX-License-Identifier: GPL-2.0-or-later
"""What a policy can remember of how long ranges stay away: histograms, in bounded memory.

A granule is 2 MiB of a region. One that something has come back to has a row of log-spaced buckets;
others have none, and cost two bytes. Old observations fade by halves. When there is no room, the
half of the rows that knows least is given up.
"""

import numpy as np
from numpy.typing import NDArray

from qmp_upm.digest import Returns
from qmp_upm.pages import Ints, Runs, distinct
from qmp_upm.protocol import Copy
from qmp_upm.units import NSEC

GRANULE_SHIFT = 9
"""Pages of a granule, as a power of two: 2 MiB."""
BUCKETS = 48
EDGES_S = 1e-3 * 2 ** (np.arange(BUCKETS) / 2)
"""Upper ends of the buckets in seconds: two for each octave, from a millisecond to three hours."""
ROWS_MOST = 4096
"""Granules with a histogram of their own: 786 KiB of them."""
FADE_ABOVE = 1024.0
"""Observations that a row has at most; then all of its buckets are halved."""
_REGION_SHIFT = 32

Floats = NDArray[np.float64]


def bucket_of(seconds: Floats) -> Ints:
    """The buckets that these durations fall in."""
    octaves = np.log2(np.maximum(seconds, 1e-9) / EDGES_S[0])
    bucket: Ints = np.clip(np.ceil(2 * octaves - 1e-9), 0, BUCKETS - 1).astype(np.int64)
    return bucket


class ReturnTimes:
    """How long runs were away, by granule and copy. Row 0 is for those without a return."""

    def __init__(self) -> None:
        self.counts = np.zeros((ROWS_MOST, BUCKETS), dtype=np.float32)
        """By row and bucket. Row 0 has nothing."""
        self._used = 1
        self._rows: dict[tuple[Copy, int], NDArray[np.uint16]] = {}

    def rows(self, copy: Copy, runs: Runs) -> Ints:
        """For each run of stale copies the row of its first granule, 0 if it has none."""
        granule, found = runs.first >> GRANULE_SHIFT, np.zeros(len(runs.first), dtype=np.int64)
        for (of, region), rows in self._rows.items():
            if of is not copy:
                continue
            mine = (runs.region == region) & (granule < len(rows))
            found[mine] = rows[granule[mine]]
        return found

    def forget(self, regions: frozenset[int]) -> None:
        """These regions are gone. Their rows are given up with the next that are."""
        for key in [key for key in self._rows if key[1] in regions]:
            self.counts[self._rows.pop(key)] = 0

    def learn(self, returns: Returns) -> dict[Copy, int]:
        """Take in what came back.

        Of each copy: how many granules had never seen a return before, and now see one that was
        kept until then.
        """
        return {
            copy: self._learn(copy, returns[returns["private"] == (copy is Copy.PRIVATE)])
            for copy in Copy
        }

    def _learn(self, copy: Copy, returns: Returns) -> int:
        if not len(returns):
            return 0
        runs = Runs(*(returns[name].astype(np.int64) for name in ("region", "first", "pages")))
        rows, kept = self.rows(copy, runs), 0
        if not rows.all():
            granules = runs.region << _REGION_SHIFT | runs.first >> GRANULE_SHIFT
            keys = distinct(granules)
            if len(keys) >= ROWS_MOST // 2:
                return 0  # nothing can be told apart in so many at once
            kept = len(distinct(granules[(rows == 0) & (returns["kept"] == 1)]))
            self._make_rows(copy, keys)
            rows = self.rows(copy, runs)
        bucket = bucket_of(returns["away_ns"] / NSEC)
        np.add.at(self.counts, (rows, bucket), np.minimum(returns["weight"], FADE_ABOVE))
        self.counts[0] = 0  # of granules that were given up while others were entered
        faded = distinct(rows)
        while len(faded := faded[self.counts[faded].sum(axis=1) > FADE_ABOVE]):
            self.counts[faded] /= 2
        return kept

    def _make_rows(self, copy: Copy, keys: Ints) -> None:
        for region in distinct(keys >> _REGION_SHIFT).tolist():
            granules = keys[keys >> _REGION_SHIFT == region] & ((1 << _REGION_SHIFT) - 1)
            rows = self._grown((copy, region), int(granules.max()) + 1)
            new = granules[rows[granules] == 0]
            if self._used + len(new) > ROWS_MOST:
                self._give_up_half()
                rows = self._rows[copy, region]
                new = granules[rows[granules] == 0]
            rows[new] = np.arange(self._used, self._used + len(new))
            self._used += len(new)

    def _grown(self, key: tuple[Copy, int], granules: int) -> NDArray[np.uint16]:
        rows = self._rows.get(key, np.zeros(0, dtype=np.uint16))
        if len(rows) < granules:
            grown = np.zeros(max(granules, 2 * len(rows)), dtype=np.uint16)
            grown[: len(rows)] = rows
            rows = self._rows[key] = grown
        return rows

    def _give_up_half(self) -> None:
        """Keep the half of the rows that has seen most, in their order."""
        seen = self.counts[: self._used].sum(axis=1)
        keep = np.sort(np.argsort(seen[1:], kind="stable")[len(seen) // 2 :] + 1)
        renumbered = np.zeros(ROWS_MOST, dtype=np.uint16)
        renumbered[keep] = np.arange(1, len(keep) + 1)
        for rows in self._rows.values():
            known = np.flatnonzero(rows)
            rows[known] = renumbered[rows[known]]
        self.counts[1 : len(keep) + 1] = self.counts[keep]
        self.counts[len(keep) + 1 :] = 0
        self._used = len(keep) + 1
