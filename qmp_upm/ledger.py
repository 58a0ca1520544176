# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's mirror of the plugin's ledger, with the age of each stale copy.

Invariants: a page is stale in one copy at most; each stale page is in exactly one cohort of its
copy; cohorts are in order of time. The mirror may hold a page that the plugin has discarded since
(it was asked to, and the page was stale again in a record that was read later): discarding it once
more is harmless. It never misses one for longer than a resynchronisation takes.
"""

from dataclasses import dataclass

from qmp_upm.pages import PageSet, Range
from qmp_upm.protocol import Copy
from qmp_upm.records import Record, Records

COHORTS_MOST = 64
"""Ages told apart for a copy. Past it, neighbours are joined, and count as the older of them."""


@dataclass
class _Cohort:
    """Copies that became stale at about the same time."""

    time_ns: int
    pages: PageSet


@dataclass(frozen=True)
class Applied:
    """What a batch changed: bytes that became stale, and bytes that were still there on return."""

    deferred_bytes: int
    reused_bytes: int


class Ledger:
    """Stale pages by copy and age. Times are CLOCK_MONOTONIC of the host, in nanoseconds."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._stale = {copy: PageSet() for copy in Copy}
        self._cohorts: dict[Copy, list[_Cohort]] = {copy: [] for copy in Copy}

    @property
    def stale_bytes(self) -> int:
        """Bytes of both copies."""
        return sum(pages.bytes for pages in self._stale.values())

    def stale(self, copy: Copy) -> PageSet:
        """A set of its own with the stale pages of one copy."""
        return self._stale[copy].copy()

    def oldest_ns(self, copy: Copy) -> int | None:
        """When the oldest copy that is still stale became so; None if there is none."""
        self._drop_empty(copy)
        return self._cohorts[copy][0].time_ns if self._cohorts[copy] else None

    def older_than(self, copy: Copy, time_ns: int) -> PageSet:
        """Pages that have been stale since ``time_ns`` or longer."""
        old = PageSet()
        for cohort in self._cohorts[copy]:
            if cohort.time_ns <= time_ns:
                old |= cohort.pages
        return old & self._stale[copy]

    def oldest(self, size: int) -> dict[Copy, PageSet]:
        """The oldest stale pages of both copies, ``size`` bytes rounded up to a page, or all."""
        chosen = {copy: PageSet() for copy in Copy}
        queue = sorted(
            (
                (cohort.time_ns, copy, cohort.pages)
                for copy in Copy
                for cohort in self._cohorts[copy]
            ),
            key=lambda entry: entry[:2],
        )
        for _, copy, pages in queue:
            if size <= 0:
                break
            part = (pages & self._stale[copy]).first(size)
            size -= part.bytes
            chosen[copy] |= part
        return {copy: pages for copy, pages in chosen.items() if pages}

    def apply(self, records: Records, now_ns: int) -> Applied:
        """Follow conversions, in their order."""
        entered = {copy: PageSet() for copy in Copy}
        deferred = reused = 0
        for record in map(Record._make, records.tolist()):
            live = Copy.PRIVATE if record.private else Copy.SHARED
            pages = Range(record.region, record.offset, record.size)
            reused += self._stale[live].remove(pages)
            entered[live].remove(pages)
            if record.deferred:
                self._stale[live.other].add(pages)
                entered[live.other].add(pages)
                deferred += record.size
            else:
                self._stale[live.other].remove(pages)
                entered[live.other].remove(pages)
        for copy, new in entered.items():
            self._enter(copy, new, now_ns)
        return Applied(deferred, reused)

    def remove(self, copy: Copy, pages: PageSet) -> None:
        """Take pages out: their discard has been asked for."""
        self._stale[copy] -= pages
        for cohort in self._cohorts[copy]:
            cohort.pages -= pages
        self._drop_empty(copy)

    def replace(self, stale: dict[Copy, PageSet], now_ns: int) -> None:
        """Begin again with what the plugin says is stale. Known ages are kept, others are now."""
        for copy in Copy:
            fresh = stale[copy].copy()
            for cohort in self._cohorts[copy]:
                cohort.pages = cohort.pages & self._stale[copy] & stale[copy]
                fresh -= cohort.pages
            self._stale[copy] = stale[copy].copy()
            self._enter(copy, fresh, now_ns)

    def _enter(self, copy: Copy, new: PageSet, now_ns: int) -> None:
        if not new:
            return
        cohorts = self._cohorts[copy]
        for cohort in cohorts:
            cohort.pages -= new
        cohorts.append(_Cohort(now_ns, new))
        if len(cohorts) > COHORTS_MOST:
            self._drop_empty(copy)
        if len(cohorts) > COHORTS_MOST:
            self._join_neighbours(copy)

    def _join_neighbours(self, copy: Copy) -> None:
        """Join the two neighbours that are closest in time."""
        cohorts = self._cohorts[copy]
        at = min(range(len(cohorts) - 1), key=lambda i: cohorts[i + 1].time_ns - cohorts[i].time_ns)
        cohorts[at].pages |= cohorts.pop(at + 1).pages

    def _drop_empty(self, copy: Copy) -> None:
        for cohort in self._cohorts[copy]:
            cohort.pages = cohort.pages & self._stale[copy]
        self._cohorts[copy] = [cohort for cohort in self._cohorts[copy] if cohort.pages]
