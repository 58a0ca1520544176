# SPDX-License-Identifier: GPL-2.0-or-later
"""Replays a timeline through a policy: the daemon's ledger and policy, its rules, virtual time.

The daemon reads when the plugin rings, at most once in ``notify_ns``; when the policy asked to be
woken; and to renew the lease. What it reads it enters in the ledger; then it asks the policy, sets
the modes and hands on the discards. A recorded trace says when the daemon read something; a replay
reads at the same times, and so gives the policy the same batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qmp_upm.ledger import Ledger
from qmp_upm.pages import PAGE_BYTES, PageSet
from qmp_upm.policy import Batch, Policy, Pressure, checked
from qmp_upm.protocol import Copy
from qmp_upm.simulator.machine import Account, Machine
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.units import NSEC

UNLIMITED = 1 << 62
"""A budget, in bytes, that nobody reaches."""
RING_RECORDS = 16384
"""What the plugin keeps for a daemon that doesn't read: ``plugin/upm.h``."""
SOONEST_NS = NSEC // 1000
"""The session waits at least that long between two decisions: ``qmp_upm.vm``."""


@dataclass(frozen=True)
class Rules:
    """When the daemon reads."""

    notify_ns: int = NSEC // 50
    tick_ns: int = 5 * NSEC // 3
    """A third of the lease."""


DEFAULT_RULES = Rules()
"""Those of the daemon's own configuration."""


@dataclass(frozen=True)
class Moment:
    """After a decision: stale bytes, and the most there were since the last one."""

    now_ns: int
    stale_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What a policy made of a timeline; prices do not matter yet."""

    timeline: Timeline
    account: Account
    final_stale_bytes: int
    dropped: int
    """Records that the daemon would have lost, or had when the trace was recorded."""
    moments: list[Moment]

    @property
    def discards(self) -> int:
        """Hole punches."""
        return self.account.inline_calls + self.account.requested_calls

    @property
    def discarded_bytes(self) -> int:
        """Given back, at conversions or on request."""
        return (self.account.inline_pages + self.account.requested_pages) * PAGE_BYTES

    @property
    def peak_stale_bytes(self) -> int:
        """The most at any time."""
        return self.account.peak_pages * PAGE_BYTES

    @property
    def mean_stale_bytes(self) -> float:
        """On average over the timeline."""
        return self.account.page_ns * PAGE_BYTES / (self.timeline.seconds * NSEC or 1.0)


def replay(
    timeline: Timeline,
    policy: Policy,
    budget_bytes: int = UNLIMITED,
    rules: Rules = DEFAULT_RULES,
) -> Outcome:
    """The whole timeline. Raises PolicyError if the policy returns what is no decision."""
    run = _Run(timeline, policy, budget_bytes)
    reads = _recorded_reads(run) if timeline.reads else _reads(run, rules)
    for high, now_ns in reads:
        run.read(high, now_ns)
    return run.finish()


def _recorded_reads(run: "_Run") -> Iterator[tuple[int, int]]:
    """As when the trace was recorded; between, the policy is woken when it asks to be."""
    now_ns = run.timeline.start_ns
    for high, time_ns in (*run.timeline.reads, (None, run.timeline.end_ns)):
        while run.wake_ns is not None and max(run.wake_ns, now_ns + SOONEST_NS) < time_ns:
            now_ns = max(run.wake_ns, now_ns + SOONEST_NS)
            yield run.at, now_ns
        now_ns = max(now_ns, time_ns)
        if high is not None:
            yield high, now_ns


def _reads(run: "_Run", rules: Rules) -> Iterator[tuple[int, int]]:
    """Up to which record the daemon reads, and when, as the run goes on."""
    times, total = run.timeline.time_ns, len(run.timeline.records)
    now_ns = run.timeline.start_ns
    rung_ns = now_ns - rules.notify_ns
    while now_ns < run.timeline.end_ns or run.at < total:
        due = now_ns + rules.tick_ns
        if run.wake_ns is not None:
            due = min(due, max(run.wake_ns, now_ns + SOONEST_NS))
        if run.at < total:
            rings_ns = max(int(times[run.at]), rung_ns + rules.notify_ns)
            if rings_ns <= due:
                due = rung_ns = rings_ns
        elif due > run.timeline.end_ns:
            return
        now_ns = due
        yield int(np.searchsorted(times, now_ns, side="right")), now_ns


class _Run:
    """One replay: the machine, the ledger and the policy between two reads."""

    def __init__(self, timeline: Timeline, policy: Policy, budget_bytes: int) -> None:
        self.timeline = timeline
        self.at = 0
        self.wake_ns: int | None = None
        self._policy = policy
        self._machine = Machine(timeline, budget_bytes)
        self._ledger = Ledger(budget_bytes)
        self._records = timeline.records.copy()
        self._moments: list[Moment] = []
        self._lost = 0
        self._decide(Batch(), timeline.start_ns)

    def read(self, high: int, now_ns: int) -> None:
        """The daemon reads up to record ``high``, and decides."""
        low, self.at = self.at, high
        if high > low:
            self._records["deferred"][low:high] = self._machine.convert(low, high)
            self._ledger.apply(self._records[low:high], now_ns)
        self._machine.pass_time(now_ns)
        # The session then reads the plugin's ledger instead: the mirror is right all the same.
        lost = max(high - low - RING_RECORDS, 0)
        self._lost += lost
        self._decide(Batch(self._records[low + lost : high], lost), now_ns)

    def finish(self) -> Outcome:
        """Hold what is stale to the end."""
        self._machine.pass_time(self.timeline.end_ns)
        self._note(self.timeline.end_ns)
        return Outcome(
            self.timeline,
            self._machine.account,
            self._machine.stale_pages * PAGE_BYTES,
            self.timeline.dropped + self._lost,
            self._moments,
        )

    def _decide(self, batch: Batch, now_ns: int) -> None:
        decision = checked(self._policy.decide(batch, self._ledger, now_ns, Pressure()))
        self._note(now_ns)
        self.wake_ns = decision.wake_at_ns
        ended = self._machine.deferred - decision.defer
        self._machine.deferred = decision.defer
        self._machine.hold_at_most(decision.hold_bytes)
        for copy in ended:  # the plugin gives back by itself what is not to be deferred any longer
            self._give_back(copy, self._ledger.stale(copy))
        for discard in decision.discards:
            self._give_back(discard.copy, discard.pages & self._ledger.stale(discard.copy))
        self._note(now_ns)

    def _give_back(self, copy: Copy, pages: PageSet) -> None:
        if pages:
            self._machine.discard(pages)
            self._ledger.remove(copy, pages)

    def _note(self, now_ns: int) -> None:
        stale, peak = self._machine.stale_pages, self._machine.take_peak()
        moment = Moment(now_ns, stale * PAGE_BYTES, peak * PAGE_BYTES)
        if not self._moments or moment != self._moments[-1]:
            self._moments.append(moment)
