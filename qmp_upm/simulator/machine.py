# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM and the plugin in virtual time: defers within the budget, and accounts for every byte.

The rules are those of ``plugin/convert.c`` and ``plugin/discard.c``: a conversion withdraws the
copy that becomes live; it then defers the discard of the other if its mode says so and the budget
has room for all of the range that is not stale already, or else discards all of it at once.
Discards are made in hole punches of 512 neighbouring pages at most. What a real plugin needs time
for takes none here.

Each conversion is taken for one that changes all of its pages. Of one that does not, as when a
guest accepts its memory, a real plugin enters nothing; here its pages are stale like any others.
"""

from dataclasses import dataclass

import numpy as np

from qmp_upm.pages import PAGE_BYTES, PageSet
from qmp_upm.protocol import Copy
from qmp_upm.simulator.timeline import PUNCH_PAGES, Flags, Ints, Timeline


@dataclass
class Account:
    """What happened, in pages, hole punches and page-nanoseconds.

    It closes: deferred = reused + requested + superseded + stale at the end.
    """

    deferred_pages: int = 0
    reused_pages: int = 0
    refaulted_pages: int = 0
    """Came back to a copy that had been discarded."""
    inline_pages: int = 0
    """Discarded at their conversion."""
    inline_calls: int = 0
    requested_pages: int = 0
    """Discarded because the policy asked, or no longer deferred."""
    requested_calls: int = 0
    superseded_pages: int = 0
    """Stale, and discarded with a later conversion of their range."""
    peak_pages: int = 0
    page_ns: float = 0.0
    """Stale pages times how long they were held."""


@dataclass(frozen=True)
class _Step:
    """What some conversions find and do.

    By touch: ``held`` pages were stale, of the private copy where ``of_private``. By record:
    ``deferred`` or not, and the ``totals`` of stale pages after it.
    """

    held: Ints
    of_private: Flags
    deferred: Flags
    totals: Ints


class Machine:
    """One guest that converts as in the timeline, whatever the policy does."""

    def __init__(self, timeline: Timeline, budget_bytes: int) -> None:
        self.account = Account()
        self.deferred: frozenset[Copy] = frozenset()
        self.stale_pages = 0
        self._timeline = timeline
        self._own_budget_pages = self._budget_pages = budget_bytes // PAGE_BYTES
        self._at_ns = timeline.start_ns
        self._recent_peak = 0
        extents = len(timeline.extents.pages)
        self._held: Ints = np.zeros(extents, dtype=np.int64)
        self._of_private: Flags = np.zeros(extents, dtype=bool)

    def convert(self, low: int, high: int) -> Flags:
        """The guest makes the conversions low to high; says of each if its discard is deferred."""
        if low == high:
            return np.zeros(0, dtype=bool)
        private = self._timeline.to_private[low:high]
        modes = np.array([Copy.PRIVATE in self.deferred, Copy.SHARED in self.deferred])
        wanted: Flags = modes[private.astype(np.intp)]
        step = self._freely(low, high, wanted)
        if (wanted & (step.totals > self._budget_pages)).any():
            step = self._singly(low, high, wanted)
        self._enter(low, high, step)
        return step.deferred

    def discard(self, pages: PageSet) -> int:
        """Give back pages, all of them stale in one copy. Returns how many pages that were."""
        extents, runs = self._timeline.extents, pages.runs()
        low = extents.find(runs.region, runs.first)
        reach = extents.find(runs.region, runs.first + runs.pages - 1) + 1 - low
        run = np.repeat(np.arange(len(low)), reach)
        at = np.arange(len(run)) + np.repeat(low - (np.cumsum(reach) - reach), reach)
        begin = np.maximum(extents.first[at], runs.first[run])
        end = np.minimum((extents.first + extents.pages)[at], (runs.first + runs.pages)[run])
        np.subtract.at(self._held, at, end - begin)
        total = int(runs.pages.sum())
        self.stale_pages -= total
        self.account.requested_pages += total
        self.account.requested_calls += int((-(-runs.pages // PUNCH_PAGES)).sum())
        return total

    def hold_at_most(self, hold_bytes: int | None) -> None:
        """The policy's own limit, within the budget; None: the budget alone."""
        most = self._own_budget_pages if hold_bytes is None else hold_bytes // PAGE_BYTES
        self._budget_pages = min(self._own_budget_pages, most)

    @property
    def excess_pages(self) -> int:
        """What is held above that, and goes at once; negative: room."""
        return self.stale_pages - self._budget_pages

    def pass_time(self, now_ns: int) -> None:
        """Nothing happens until then but that copies are held."""
        self.account.page_ns += self.stale_pages * max(now_ns - self._at_ns, 0)
        self._at_ns = max(now_ns, self._at_ns)

    def take_peak(self) -> int:
        """The most stale pages since the last call."""
        peak, self._recent_peak = self._recent_peak, self.stale_pages
        return max(peak, self.stale_pages)

    def _freely(self, low: int, high: int, wanted: Flags) -> _Step:
        """All at once, as if there were no budget."""
        line = self._timeline
        touches = line.touches(low, high)
        pages, private = line.touch_pages[touches], line.touch_private[touches]
        extent, before = line.touch_extent[touches], line.touch_before[touches]
        deferred = wanted[line.touch_record[touches] - low]
        held, of_private = self._held[extent], self._of_private[extent]
        within = np.flatnonzero(before >= touches.start)
        previous = before[within] - touches.start
        held[within] = np.where(deferred[previous], pages[within], 0)
        of_private[within] = ~private[previous]
        steps = np.where(deferred, pages, 0) - held
        first = line.first_touch[low:high] - touches.start
        totals = self.stale_pages + np.cumsum(np.add.reduceat(steps, first))
        return _Step(held, of_private, wanted, totals)

    def _singly(self, low: int, high: int, wanted: Flags) -> _Step:
        """One after the other: each time the budget decides what the next one finds."""
        line = self._timeline
        touches = line.touches(low, high)
        extents = line.touch_extent[touches]
        keys, pages = extents.tolist(), line.touch_pages[touches].tolist()
        state = dict(
            zip(
                keys,
                zip(self._held[extents].tolist(), self._of_private[extents].tolist(), strict=True),
                strict=True,
            )
        )
        first = (line.first_touch[low : high + 1] - touches.start).tolist()
        found, totals, outcome, stale = [], [], [], self.stale_pages
        for index, want in enumerate(wanted.tolist()):
            private = bool(line.to_private[low + index])
            mine = range(first[index], first[index + 1])
            found += [state[keys[touch]] for touch in mine]
            stale -= sum(held for held, _ in found[mine.start :])
            size = sum(pages[mine.start : mine.stop])
            fits = want and stale + size <= self._budget_pages
            stale += size if fits else 0
            for touch in mine:
                state[keys[touch]] = (pages[touch] if fits else 0, not private)
            totals.append(stale)
            outcome.append(fits)
        held, of_private = zip(*found, strict=True)
        return _Step(
            np.array(held, dtype=np.int64),
            np.array(of_private, dtype=bool),
            np.array(outcome, dtype=bool),
            np.array(totals, dtype=np.int64),
        )

    def _enter(self, low: int, high: int, step: _Step) -> None:
        """Account for conversions whose outcome is known, and remember what they leave."""
        line, account = self._timeline, self.account
        touches = line.touches(low, high)
        pages, private = line.touch_pages[touches], line.touch_private[touches]
        deferred = step.deferred[line.touch_record[touches] - low]
        given = int(pages[deferred].sum())
        reused = np.where(step.of_private == private, step.held, 0)
        same = step.held - reused
        taken = int(reused.sum())
        account.reused_pages += taken
        account.refaulted_pages += int(pages[line.touch_returns[touches]].sum()) - taken
        account.deferred_pages += given - int(same[deferred].sum())
        account.superseded_pages += int(same[~deferred].sum())
        account.inline_pages += int(pages.sum()) - given
        account.inline_calls += int(line.record_calls[low:high][~step.deferred].sum())
        last = line.touch_after[touches] >= touches.stop
        extent = line.touch_extent[touches][last]
        self._held[extent] = np.where(deferred, pages, 0)[last]
        self._of_private[extent] = ~private[last]
        times = line.time_ns[low:high]
        self.pass_time(int(times[0]))
        account.page_ns += float(np.dot(step.totals[:-1].astype(float), np.diff(times)))
        self._recent_peak = max(self._recent_peak, int(step.totals.max()))
        account.peak_pages = max(account.peak_pages, self._recent_peak)
        self.stale_pages, self._at_ns = int(step.totals[-1]), int(times[-1])
