# SPDX-License-Identifier: GPL-2.0-or-later
"""Replays a timeline through a policy: the daemon's ledger and policy, its rules, virtual time.

The daemon reads when the plugin rings, at most once in ``NOTIFY_NS``, and when the policy asked to
be woken. What it reads it enters in the ledger; then it asks the policy, sets the modes and hands
on the discards. Where records were lost, it reads the plugin's ledger before. A recorded trace says
when the daemon read something, and what it had lost; a replay reads at the same times, and so gives
the policy the same batches. The policy is contained as it is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qmp_upm.clock import Clock
from qmp_upm.contained import ContainedPolicy
from qmp_upm.ledger import Ledger
from qmp_upm.pages import PAGE_BYTES, PageSet
from qmp_upm.policy import Batch, Measured, Policy, Pressure
from qmp_upm.prices import Prices
from qmp_upm.protocol import RING_RECORDS, Copy
from qmp_upm.records import Records
from qmp_upm.simulator.machine import Account, Machine
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.stats import FEW_DISCARDS, FEW_SECONDS, VmStats
from qmp_upm.trace import Read
from qmp_upm.units import NSEC

UNLIMITED = 1 << 62
"""A budget, in bytes, that nobody reaches."""
SOONEST_NS = NSEC // 500
"""The session waits at least that long between two turns: ``qmp_upm.serving``."""
MEASURE_SECONDS = 3.0
"""How long after a change the session asks for the plugin's counters: ``qmp_upm.serving``."""
NOTIFY_NS = NSEC // 50
"""The plugin rings no more often, as the daemon's configuration has it."""


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
    fallen_back: str | None
    """Why the policy no longer decided from some time on, and ``eager`` did; None if it held."""

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
    prices: Prices | None = None,
) -> Outcome:
    """The whole timeline. A policy that fails is replaced by ``eager``, and the outcome says so.

    With ``prices``, the policy is told what discards take, as the daemon tells what is measured.
    """
    run = Replay(timeline, policy, budget_bytes, prices)
    for read in _recorded_reads(run) if timeline.reads else _reads(run):
        run.read(read)
    return run.finish()


def _recorded_reads(run: "Replay") -> Iterator[Read]:
    """As when the trace was recorded; between, the policy is woken when it asks to be.

    Not while the daemon was about to read: then the next read is when it could act.
    """
    now_ns, times = run.timeline.start_ns, run.timeline.time_ns
    for read in (*run.timeline.reads, None):
        until_ns = run.timeline.end_ns if read is None else read.now_ns
        first_ns = int(times[run.at]) if run.at < len(times) else until_ns
        while run.wake_ns is not None:
            due_ns = max(run.wake_ns, now_ns + SOONEST_NS)
            if due_ns >= min(first_ns, until_ns):
                break
            now_ns = due_ns
            yield Read(run.at, now_ns, 0)
        now_ns = max(now_ns, until_ns)
        if read is not None:
            yield read._replace(now_ns=now_ns)


def _reads(run: "Replay") -> Iterator[Read]:
    """Up to which record the daemon reads, and when, as the run goes on."""
    times, total = run.timeline.time_ns, len(run.timeline.records)
    now_ns = run.timeline.start_ns
    rung_ns = now_ns - NOTIFY_NS
    while True:
        due = [] if run.wake_ns is None else [max(run.wake_ns, now_ns + SOONEST_NS)]
        if run.at < total:
            rings_ns = max(int(times[run.at]), rung_ns + NOTIFY_NS)
            if not due or rings_ns <= due[0]:
                due = [rings_ns]
                rung_ns = rings_ns
        elif not due or due[0] > run.timeline.end_ns:
            return
        now_ns = due[0]
        end = int(np.searchsorted(times, now_ns, side="right"))
        yield Read(end, now_ns, max(end - run.at - RING_RECORDS, 0))


class Replay:
    """One replay: the machine, the ledger and the policy between two reads."""

    def __init__(
        self,
        timeline: Timeline,
        policy: Policy,
        budget_bytes: int,
        prices: Prices | None = None,
    ) -> None:
        self.timeline = timeline
        self._prices = prices
        self._measure_ns = timeline.start_ns
        self.at = 0
        self._now_ns = timeline.start_ns
        self._policy = ContainedPolicy(
            lambda: policy, VmStats(), Clock(monotonic_ns=lambda: self._now_ns)
        )
        self._machine = Machine(timeline, budget_bytes)
        self._ledger = Ledger(budget_bytes)
        self._records = timeline.records.copy()
        self._moments: list[Moment] = []
        self._lost = 0
        self._decide(Batch())
        self._policy.attached(self._ledger)

    @property
    def wake_ns(self) -> int | None:
        """When the policy wants to be asked again, whatever comes."""
        return self._policy.wake_at_ns

    def read(self, read: Read) -> None:
        """The daemon reads, and decides."""
        low, self.at, self._now_ns = self.at, read.end, read.now_ns
        self._records["deferred"][low : read.end] = self._machine.convert(low, read.end)
        self._machine.pass_time(read.now_ns)
        # Those of a recorded trace were lost before it was written: they are not among these.
        missing = 0 if self.timeline.reads else read.dropped
        records = self._records[low : read.end]
        if read.dropped:
            self._resynchronise(records, missing)
        elif len(records):
            self._ledger.apply(records, read.now_ns)
        self._lost += read.dropped
        self._measure()
        self._decide(Batch(records[missing:], read.dropped))

    def _resynchronise(self, records: Records, missing: int) -> None:
        """Follow what was not lost; then the ledger becomes what the plugin's is."""
        plugin = Ledger(self._ledger.budget_bytes)
        plugin.replace({copy: self._ledger.stale(copy) for copy in Copy}, self._now_ns)
        plugin.apply(records, self._now_ns)
        self._ledger.apply(records[missing:], self._now_ns)
        self._ledger.replace({copy: plugin.stale(copy) for copy in Copy}, self._now_ns)
        self._policy.attached(self._ledger)

    def finish(self) -> Outcome:
        """Hold what is stale to the end."""
        self._machine.pass_time(self.timeline.end_ns)
        self._note(self.timeline.end_ns)
        self._policy.detached()
        return Outcome(
            self.timeline,
            self._machine.account,
            self._machine.stale_pages * PAGE_BYTES,
            self._lost,
            self._moments,
            self._policy.fallen_back,
        )

    def _decide(self, batch: Batch) -> None:
        decision = self._policy.decide(batch, self._ledger, self._now_ns, Pressure())
        self._note(self._now_ns)
        ended = self._machine.deferred - decision.defer
        self._machine.deferred = decision.defer
        self._machine.hold_at_most(decision.hold_bytes)
        for copy in Copy:  # as plugin/worker.c drains an excess: by copy and region, from the start
            excess = self._machine.excess_pages
            if excess > 0:
                self._give_back(copy, self._ledger.stale(copy).first(excess * PAGE_BYTES))
        for copy in ended:  # the plugin gives back by itself what is not to be deferred any longer
            self._give_back(copy, self._ledger.stale(copy))
        for discard in decision.discards:
            self._give_back(discard.copy, discard.pages & self._ledger.stale(discard.copy))
        self._note(self._now_ns)

    def _measure(self) -> None:
        """Tell what discards have taken, as often as the daemon asks the plugin."""
        if self._prices is None or self._now_ns < self._measure_ns:
            return
        calls, pages = self._machine.account.requested_calls, self._machine.account.requested_pages
        if calls:
            pause_s = FEW_SECONDS if calls < FEW_DISCARDS else MEASURE_SECONDS
            self._measure_ns = self._now_ns + int(pause_s * NSEC)
            seconds = self._prices.discard_call * calls + self._prices.discard_page * pages
            self._policy.measured(Measured(calls, pages, seconds))

    def _give_back(self, copy: Copy, pages: PageSet) -> None:
        if pages:
            self._machine.discard(pages)
            self._ledger.remove(copy, pages)

    def _note(self, now_ns: int) -> None:
        stale, peak = self._machine.stale_pages, self._machine.take_peak()
        moment = Moment(now_ns, stale * PAGE_BYTES, peak * PAGE_BYTES)
        if not self._moments or moment != self._moments[-1]:
            self._moments.append(moment)
