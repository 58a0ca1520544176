# SPDX-License-Identifier: GPL-2.0-or-later
"""Hold what will soon flip back, give back the rest: ski rental with learnt return times.

A run of stale pages is planned when it is left, and reconsidered when its time is up:

- if something has come back to its granule, for the hold of least expected cost under the return
  times seen there (``skirental.cheapest_hold``);
- if nothing has, for ``Bill.sure_hold``, a small part of what its discard costs. The first few are
  held longer, to learn, and more if they come back: TRIALS.

What can be promised on any trace: a run that never comes back costs 1 + HEDGE times its optimum, or
no more than 1 + √(P/D) where that is all one can know. A promise of 2 on every trace besides is
impossible: who pays at most (1 + λ)·D for what never comes back has let go at λ·D/r, and pays P
if the guest takes it back then, 1 + P/(λ·D) times the optimum. Such losses are few, since the first
return of a granule teaches. And where return times are learnt, what is let go before
``sure_hold`` is a bet that must be paid from credit: CREDIT of the price of the conversions, and
what runs so far have cost less than twice their optimum. So learning can't lose more than that.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator
from qmp_upm_policies.limits import LimitParameters, Limits, give_all_back
from qmp_upm_policies.skirental import PUNCH_PAGES, Bill, cheapest_hold

from qmp_upm import policy
from qmp_upm.digest import Returns
from qmp_upm.errors import ConfigError
from qmp_upm.history import EDGES_S, Floats, ReturnTimes
from qmp_upm.pages import PAGE_BYTES, Ints, PageSet, Runs, distinct
from qmp_upm.policy import Batch, Decision, Discard, LedgerView, Measured, Policy, Pressure
from qmp_upm.prices import Prices, load_prices
from qmp_upm.protocol import Copy
from qmp_upm.units import NSEC, Seconds

TRIALS = {Copy.PRIVATE: 20, Copy.SHARED: 1}
"""Runs of each copy held until their rent is what their loss would cost, and lost: one that comes
back has cost no more than the optimum, and another is held in its place. More of the private copy:
RAM is private by default, and what a guest shares for a purpose tends to be taken back."""
FIRST_BYTES = 8 << 20
"""Held until sizes of conversions are known, and beyond what is held where they are too big."""
CREDIT = 0.1
GRAIN_S = 2e-3
"""Whoever holds for less than that need not defer: decisions are no finer."""
JOIN = 16
"""Runs are waited for together whose times differ by no more than this part of their hold."""
DEFAULT_PRICES = Prices(
    conversion=2e-6, discard_call=4.3e-6, discard_page=1.05e-6, refault_page=2.7e-6
)
"""What our benchmarks measured; believed of any machine until its own discards are measured."""
BELIEF_CALLS = 4
"""Discards of a page at these prices, beside those that were measured."""


def _read_prices(value: object) -> object:
    """The prices in the file of that name; anything else is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return load_prices(Path(value))
    except ConfigError as error:
        raise ValueError(f"{error.message}; {error.hint}") from error


class AdaptiveParameters(LimitParameters):
    """``prices``: a file that ``qmp-upm calibrate`` has written, or a table like the one in it.

    Without it, discards cost what the VM's own are measured to take. ``max_age`` is longer than
    elsewhere: what is held has a reason.
    """

    prices: Annotated[Prices, BeforeValidator(_read_prices)] = DEFAULT_PRICES
    max_age: Seconds = 3600.0


@dataclass
class _Waiting:
    """Runs with the same hold, left between these two times."""

    first_ns: int
    last_ns: int
    pages: PageSet


class Adaptive(Policy):
    """Learns from ``ledger.returns``; waits with runs in a queue for each hold."""

    Parameters: ClassVar[type[policy.Parameters]] = AdaptiveParameters

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self._prices: Prices = parameters.prices
        self._limits = Limits(parameters)
        self._times = ReturnTimes()
        self._queues: dict[tuple[Copy, int], deque[_Waiting]] = {}
        self._begun = False
        self._credit_s = 0.0
        self._trials = dict(TRIALS)
        self._hold_bytes: int | None = FIRST_BYTES
        costs = self._prices.discard_call + self._prices.discard_page
        self._defer = frozenset(Copy) if costs else frozenset()

    def decide(self, batch: Batch, ledger: LedgerView, now_ns: int, pressure: Pressure) -> Decision:
        """Learn from what came back, plan for what was left, and let go what is due."""
        if len(batch):
            self._learn(batch, ledger.returns())
            self._choose_modes(batch, ledger.stale_bytes)
        if not self._begun:
            self.attached(ledger, now_ns)
        elif len(batch) and not batch.dropped:  # else it was planned for with all the others
            for copy in Copy:
                self._plan(copy, ledger.entered(copy), now_ns)
        if self._limits.is_pressed(pressure):
            return Decision(discards=give_all_back(ledger, "pressure"))
        discards = (
            self._due(ledger, now_ns)
            or self._too_old(ledger, now_ns)
            or self._limits.over_budget(ledger)
        )
        # What speaks for a discard besides is heard at once, with these taken out.
        wake = now_ns if discards else self._next_ns(ledger)
        return Decision(self._defer, tuple(discards), wake, self._hold_bytes)

    def attached(self, ledger: LedgerView, now_ns: int) -> None:
        """What is stale now is waited for anew: nothing is known of the time between."""
        self._begun = True
        self._queues.clear()
        for copy in Copy:
            self._plan(copy, ledger.stale(copy).runs(), now_ns)

    def measured(self, discards: Measured) -> None:
        """Scale the default prices of discards to what they take here; given ones hold."""
        if "prices" in self.parameters.model_fields_set:
            return
        call, page = DEFAULT_PRICES.discard_call, DEFAULT_PRICES.discard_page
        expected_s = call * discards.calls + page * discards.pages
        belief_s = BELIEF_CALLS * (call + page)
        factor = (belief_s + discards.seconds) / (belief_s + expected_s)
        self._prices = DEFAULT_PRICES.model_copy(
            update={"discard_call": factor * call, "discard_page": factor * page}
        )

    def forgotten(self, regions: frozenset[int]) -> None:
        """Return times of these are of no use any longer."""
        self._times.forget(regions)

    def _too_old(self, ledger: LedgerView, now_ns: int) -> list[Discard]:
        """Whatever got into the ledger unseen, by a resynchronisation, goes by age."""
        since_ns = now_ns - int(self.parameters.max_age * NSEC)
        old = ((copy, ledger.older_than(copy, since_ns)) for copy in Copy)
        return [Discard(copy, pages, "age") for copy, pages in old if pages]

    def _next_ns(self, ledger: LedgerView) -> int | None:
        waiting = ((queue, k) for (_, k), queue in self._queues.items() if queue)
        times = [queue[0].last_ns + _hold_ns(k) for queue, k in waiting]
        oldest = (ledger.oldest_ns(copy) for copy in Copy)
        age_ns = int(self.parameters.max_age * NSEC)
        return min([*times, *(ns + age_ns for ns in oldest if ns is not None)], default=None)

    def _learn(self, batch: Batch, returns: Returns) -> None:
        for copy, kept in self._times.learn(returns).items():
            self._trials[copy] = min(self._trials[copy] + kept, TRIALS[copy])
        records = batch.records
        self._credit_s += CREDIT * self._prices.conversion * float(records["count"].sum())
        at_once = records["size"][records["deferred"] == 0] // PAGE_BYTES
        self._credit_s -= float(Bill.of(self._prices, at_once).full.sum())
        bill = Bill.of(self._prices, returns["pages"])
        rent = bill.rent * returns["away_ns"] / NSEC
        paid = np.where(returns["kept"] == 1, rent, 0.0)  # others were charged when let go
        self._credit_s += float(
            ((2 * np.minimum(rent, bill.full) - paid) * returns["weight"]).sum()
        )

    def _choose_modes(self, batch: Batch, stale_bytes: int) -> None:
        """Defer what is worth it, unless a later discard in many punches would be much dearer."""
        pages = batch.records["size"] // PAGE_BYTES
        bill = Bill.of(self._prices, pages)
        worth = bill.drop >= GRAIN_S * bill.rent
        private = batch.records["private"] == 1
        modes = set()
        for copy in Copy:
            own = private == (copy is Copy.SHARED)
            if np.mean(worth[own] if own.any() else worth) > 1 / 2:
                modes.add(copy)
        self._defer = frozenset(modes)
        more = self._prices.discard_call * (-(-pages // PUNCH_PAGES) - 1)
        fits = np.mean(2 * more <= bill.full) > 1 / 2
        self._hold_bytes = None if fits else stale_bytes + FIRST_BYTES

    def _holds(self, copy: Copy, runs: Runs, bill: Bill) -> tuple[Floats, Ints]:
        """Seconds to hold each run, and the row of its granule in what has been learnt."""
        hold, rows = bill.sure_hold(), self._times.rows(copy, runs)
        known = np.flatnonzero(rows)
        if len(known):
            # Of runs of one granule and about one size, one is worked out.
            size = np.round(2 * np.log2(runs.pages[known])).astype(np.int64)
            kind = rows[known] << 8 | size
            kinds = distinct(kind)
            each = np.searchsorted(kinds, kind)
            at = np.empty_like(kinds)
            at[each] = known
            part = Bill(bill.drop[at], bill.full[at], bill.rent[at])
            hold[known] = cheapest_hold(self._times.counts[rows[at]].astype(float), part)[each]
        return hold, rows

    def _plan(self, copy: Copy, runs: Runs, now_ns: int) -> None:
        if not len(runs.pages):
            return
        bill = Bill.of(self._prices, runs.pages)
        hold, rows = self._holds(copy, runs, bill)
        if self._trials[copy]:
            new = np.flatnonzero((rows == 0) & (runs.pages <= FIRST_BYTES // PAGE_BYTES))
            new = new[: self._trials[copy]]
            until = bill.full if copy is Copy.PRIVATE else bill.drop
            hold[new] = np.maximum(hold, until / bill.rent)[new]
            self._trials[copy] -= len(new)
        self._wait(copy, runs, hold, now_ns)

    def _wait(self, copy: Copy, runs: Runs, hold: Floats, since_ns: int) -> None:
        bucket = self._bucket(hold)
        for k in distinct(bucket).tolist():
            queue = self._queues.setdefault((copy, k), deque())
            pages = _pick(runs, bucket == k)
            if queue and since_ns - queue[-1].first_ns <= _hold_ns(k) // JOIN:
                queue[-1].pages |= pages
                queue[-1].last_ns = max(queue[-1].last_ns, since_ns)
            else:
                queue.append(_Waiting(since_ns, since_ns, pages))

    def _due(self, ledger: LedgerView, now_ns: int) -> list[Discard]:
        discards = []
        for (copy, k), queue in sorted(self._queues.items(), key=lambda item: item[0][1]):
            since_ns = now_ns - _hold_ns(k)
            if not queue or queue[0].last_ns > since_ns:
                continue
            due = queue.popleft().pages
            while queue and queue[0].last_ns <= since_ns:
                due |= queue.popleft().pages
            # Pages that came back meanwhile are not stale, or not for so long.
            if pages := ledger.older_than(copy, since_ns, due):
                go = self._let_go(copy, k, pages, since_ns)
                if go:
                    discards.append(Discard(copy, go, "learnt" if k >= 0 else "at-once"))
        return discards

    def _let_go(self, copy: Copy, k: int, pages: PageSet, since_ns: int) -> PageSet:
        """Those of ``pages``, held for hold ``k``, that are held no longer; the rest waits on."""
        runs, age_s = pages.runs(), _hold_ns(k) / NSEC
        bill = Bill.of(self._prices, runs.pages)
        hold, rows = self._holds(copy, runs, bill)
        sure = bill.sure_hold()
        risk = np.maximum(bill.full - bill.rent * age_s, 0)
        stay = self._bucket(hold) > k
        bets = ~stay & (rows > 0) & (self._bucket(sure) > k)
        unpaid = bets & (np.cumsum(np.where(bets, risk, 0)) > self._credit_s)
        hold[unpaid] = sure[unpaid]
        stay |= unpaid
        self._credit_s -= float(risk[~stay].sum())
        if not stay.any():
            return pages
        self._wait(copy, Runs(*(column[stay] for column in runs)), hold[stay], since_ns)
        return _pick(runs, ~stay)

    def _bucket(self, hold: Floats) -> Ints:
        """The longest hold that a queue is kept for within these; -1: none at all."""
        capped = np.minimum(hold, self.parameters.max_age)
        bucket: Ints = np.searchsorted(EDGES_S, capped, side="right") - 1
        return bucket


def _hold_ns(k: int) -> int:
    return 0 if k < 0 else int(EDGES_S[k] * NSEC)


def _pick(runs: Runs, which: NDArray[np.bool_]) -> PageSet:
    return PageSet.of_runs(Runs(*(column[which] for column in runs)))
