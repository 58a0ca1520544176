# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of a VM whether or not it is attached: settings, policy, ledger and counters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from qmp_upm.clock import Clock
from qmp_upm.config import PolicyTable, VmSettings
from qmp_upm.contained import ContainedPolicy
from qmp_upm.events import HostEventName, Publisher
from qmp_upm.ledger import Ledger
from qmp_upm.limits import KNOWN_BYTES_MOST
from qmp_upm.pages import PAGE_BYTES, PageSet
from qmp_upm.policy import Batch, Decision, Measured, Pressure
from qmp_upm.protocol import Copy, Query
from qmp_upm.recording import BOUNDS
from qmp_upm.remarks import Remark, remarks
from qmp_upm.stats import PluginTotals
from qmp_upm.telemetry import Telemetry
from qmp_upm.trace import Block
from qmp_upm.units import NSEC

TELL_SECONDS = 1.0
"""The least time between two events of one kind: a VM can't crowd out what others have to tell."""

WARN_SECONDS = 60.0
"""The same for lines of the log."""
WEIGH_EVERY = 1 << 16
"""Records after which the memory for a guest's pages is looked at."""

Tell = Callable[[HostEventName, Mapping[str, object]], None]


@dataclass(frozen=True)
class Admission:
    """Under which name a VM is looked after, with what, and where its counters go on."""

    name: str
    settings: VmSettings
    telemetry: Telemetry
    totals: PluginTotals


class Guest:
    """One VM. Its session's task changes it; others look."""

    def __init__(self, admission: Admission, tell: Tell, clock: Clock) -> None:
        self.clock = clock
        self.name = admission.name
        self.log = structlog.get_logger(vm=self.name)
        self.settings = admission.settings
        self.telemetry = admission.telemetry
        self.totals = admission.totals
        self.stats = self.totals.stats
        self.table = self.settings.policy
        """Which policy, and with which parameters."""
        self.policy = ContainedPolicy(self.table.make, self.stats, clock)
        self.batches: Publisher[Block] = Publisher(BOUNDS)
        self.pressure = Pressure()
        self.chosen_policy: PolicyTable | None = None
        self.chosen_budget: int | None = None
        self.share: int | None = None
        """Of the host's budget; None while the host has none."""
        self.ledger = Ledger(self.budget_bytes)
        self.remarks: Sequence[Remark] = ()
        self._touched = PageSet()
        self._unweighed = 0
        self._regions: set[int] = set()
        self._unseen = dict.fromkeys(Copy, 0)
        self._followed_ns = 0
        self._tell = tell
        self._told_ns: dict[str, int] = {}
        self._said_fallback: str | None = None
        self.set_budget()

    @property
    def own_budget_bytes(self) -> int:
        """What it may hold by itself: by command, else by configuration."""
        return self.settings.budget if self.chosen_budget is None else self.chosen_budget

    @property
    def budget_bytes(self) -> int:
        """What it may hold now."""
        own = self.own_budget_bytes
        return own if self.share is None else min(own, self.share)

    def restarted(self) -> None:
        """Another QEMU is there: its guest has converted nothing yet."""
        self.totals.restarted()
        self.forget()
        self.batches.close()  # a trace is of one guest

    def set_budget(self) -> None:
        """Have the ledger and the counters know of a changed budget."""
        changed = self.ledger.budget_bytes != self.budget_bytes
        self.ledger.budget_bytes = self.stats.budget_bytes = self.budget_bytes
        if changed:
            self.telemetry.line("budget", bytes=self.budget_bytes)
            self.tell(HostEventName.BUDGET_CHANGED, budget=self.budget_bytes)

    def admit(self, admission: Admission) -> None:
        """It has another name, or another configuration."""
        self.totals, self.stats = admission.totals, admission.totals.stats
        self.policy.stats = self.stats
        self.name, self.telemetry = admission.name, admission.telemetry
        self.log = structlog.get_logger(vm=self.name)
        self.configure(admission.settings)

    def configure(self, settings: VmSettings) -> None:
        """Take what the configuration says now. What it changes, no command holds against it."""
        before, self.settings = self.settings, settings
        if settings.budget != before.budget:
            self.chosen_budget = None
        if settings.policy.factory() != before.policy.factory():
            self.chosen_policy = None
            self.policy.replace(settings.policy.name, settings.policy.make)
            self._say_policy(settings.policy)
        self.set_budget()

    def swap(self, table: PolicyTable) -> None:
        """Another policy over the same ledger. ConfigError or PolicyError: the one before stays."""
        self.policy.swap(table.name, table.make)
        self._say_policy(table)

    def _say_policy(self, table: PolicyTable) -> None:
        self.table = table
        parameters = table.parameters
        self.log.info("policy-changed", policy=table.name, parameters=parameters)
        self.telemetry.line("policy", policy=table.name, parameters=parameters)
        self.tell(HostEventName.POLICY_CHANGED, policy=table.name, parameters=parameters)
        self._say_fallback()

    def tell(self, event: HostEventName, **data: object) -> None:
        """Tell the host's subscribers."""
        self._tell(event, data)

    def tell_rarely(self, event: HostEventName, **data: object) -> None:
        """The same for what the VM itself can cause as often as it likes."""
        if self._is_rare(event, TELL_SECONDS):
            self._tell(event, data)

    def warn_rarely(self, event: str, hint: str) -> None:
        """A line of the log that the VM itself can cause as often as it likes."""
        if self._is_rare(event, WARN_SECONDS):
            self.log.warning(event, hint=hint)

    def _is_rare(self, what: str, seconds: float) -> bool:
        now_ns = self.clock.monotonic_ns()
        told_ns = self._told_ns.get(what)
        if told_ns is not None and now_ns < told_ns + seconds * NSEC:
            return False
        self._told_ns[what] = now_ns
        return True

    def follow(self, batch: Batch, cursor: int) -> None:
        """Conversions that the guest has made: into the ledger, the counters and the telemetry."""
        now_ns = self._followed_ns = self.clock.monotonic_ns()
        self.batches.put(Block(batch.records, batch.dropped, now_ns))
        applied = self.ledger.apply(batch.records, now_ns)
        sizes = batch.records["size"]
        to_private = batch.records["private"] == 1
        touched = self.ledger.converted()
        fresh_bytes = touched.bytes - touched.common_bytes(self._touched)
        self._touched |= touched
        self.stats.flips += (int(sizes.sum()) - fresh_bytes) // PAGE_BYTES
        conversions = int(batch.records["count"].sum())
        self.stats.followed_conversions += conversions
        self.stats.dropped_records += batch.dropped
        self.totals.follow(batch.records, cursor)
        self.count_stale()
        self._unweighed += len(batch)
        self.telemetry.line(
            "batch",
            cursor=cursor,
            records=len(batch),
            conversions=conversions,
            to_private_bytes=int(sizes[to_private].sum()),
            to_shared_bytes=int(sizes[~to_private].sum()),
            deferred_bytes=applied.deferred_bytes,
            reused_bytes=applied.reused_bytes,
            dropped=batch.dropped,
            stale_bytes=self.ledger.stale_bytes,
        )

    def overgrown(self) -> bool:
        """Whether what is known of the guest takes too much memory; then it is forgotten.

        The ledger is to be read again. Flips are counted anew.
        """
        if self._unweighed < WEIGH_EVERY:
            return False
        self._unweighed = 0
        if self._touched.memory_bytes <= KNOWN_BYTES_MOST:
            return False
        self._touched = PageSet()
        return True

    def resynchronise(self, stale: dict[Copy, PageSet], query: Query) -> None:
        """Begin again with the plugin's own ledger, and have the policy plan with it."""
        self.ledger.replace(stale, self.clock.monotonic_ns())
        self.stats.resyncs += 1
        self._unseen = dict.fromkeys(Copy, 0)
        self.take(query)
        self.telemetry.line("resync", stale_bytes=self.ledger.stale_bytes)
        self.policy.attached(self.ledger)

    def take(self, query: Query) -> None:
        """The plugin's counters, which are exact whatever was dropped on the way, and regions."""
        self.totals.take(query.counters, query.latency_ns, query.records.head)
        self.stats.peak_stale_bytes = query.stale.peak
        self.remarks = remarks(query.regions)
        known = {region.id for region in query.regions}
        gone = self.ledger.forget_regions_but(known) | (self._regions - known)
        self._touched.drop_regions(set(self._touched.regions) - known)
        self._regions = known
        if gone:
            self.policy.forgotten(gone)
        if calls := self.stats.discard_calls:
            self.policy.measured(
                Measured(calls, self.stats.discarded_pages, self.stats.discard_seconds)
            )
        self.count_stale()

    def agrees(self, query: Query) -> bool:
        """Whether the mirror is what the plugin says. What it lacks, or has too much, is shown."""
        mirror = {copy: self.ledger.bytes_by_region(copy) for copy in Copy}
        self._unseen = {
            copy: getattr(query.stale, copy) - sum(mirror[copy].values()) for copy in Copy
        }
        self.count_stale()
        return not any(self._unseen.values()) and all(
            mirror[Copy.PRIVATE].get(region.id, 0) == region.stale_private
            and mirror[Copy.SHARED].get(region.id, 0) == region.stale_shared
            for region in query.regions
        )

    def forget(self) -> None:
        """Nothing is held any longer, and nothing that is known of pages will be of use."""
        self.ledger.forget()
        self._touched, self._regions = PageSet(), set()
        self._unseen = dict.fromkeys(Copy, 0)
        self.count_stale()

    def count_stale(self) -> None:
        """Have the counters know of a changed ledger."""
        for copy in Copy:
            self.stats.stale_bytes[copy] = self.ledger.bytes_of(copy) + self._unseen[copy]

    def decide(self, batch: Batch) -> Decision:
        """The policy's decision; if it fails now, the reason is said once.

        For the policy it is when the batch was followed: the time in the ledger, and in a trace.
        """
        now_ns = self._followed_ns if len(batch) else self.clock.monotonic_ns()
        decision = self.policy.decide(batch, self.ledger, now_ns, self.pressure)
        self._say_fallback()
        return decision

    def _say_fallback(self) -> None:
        error, policy = self.policy.fallen_back, self.table.name
        if error == self._said_fallback:
            return
        self._said_fallback = error
        if error is None:
            return
        self.log.error(
            "fallback",
            policy=policy,
            error=error,
            hint="its VM goes on with eager until another policy is set; tell the policy's author",
        )
        self.telemetry.line("fallback", policy=policy, error=error)
        self.tell(HostEventName.POLICY_FELL_BACK, policy=policy, error=error)
