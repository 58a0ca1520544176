# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM's session: attach, follow its conversions, apply its policy, and again after a break."""

import asyncio
import random
import time

import structlog

from qmp_upm.backends import KvmAttributes, Settings
from qmp_upm.config import VmSettings
from qmp_upm.errors import MessageError, PeerError, PluginMissingError, PolicyError
from qmp_upm.events import Publisher
from qmp_upm.exits import PluginExits
from qmp_upm.ledger import Ledger
from qmp_upm.plugin import plugin_env
from qmp_upm.policy import Batch, Decision, Policy, Pressure, checked
from qmp_upm.protocol import COMMANDS, PROTOCOL, Copy, Discarded, Event, Query, read_message
from qmp_upm.qmp import Monitor
from qmp_upm.recording import BOUNDS
from qmp_upm.stats import State, Trouble, VmStats, VmView
from qmp_upm.telemetry import Telemetry
from qmp_upm.trace import Block
from qmp_upm.units import NSEC

BACKOFF_FIRST = 0.2
BACKOFF_MOST = 10.0
REFUSED_SECONDS = 5.0
SETTLE_SECONDS = 1.0

log = structlog.get_logger()


class Session:
    """Serves one VM until cancelled. One task runs it; nothing else touches its state."""

    def __init__(self, name: str, socket: str, table: VmSettings, telemetry: Telemetry) -> None:
        self.name = name
        self.state = State.CONNECTING
        self.stats = VmStats()
        self.batches: Publisher[Block] = Publisher(BOUNDS)
        self._socket = socket
        self._table = table
        self._since = time.time()
        self._trouble_now: Trouble | None = None
        self._qemu: tuple[str, str, str] | None = None
        self.telemetry = telemetry
        self._telemetry = telemetry
        self._policy: Policy = table.policy.make()
        self._failed = False
        self._said: tuple[str, str] | None = None
        self._totals = {"conversions": 0, "discarded_bytes": 0}
        self._ledger = Ledger(table.budget)
        self._wake_ns: int | None = None

    def view(self) -> VmView:
        """As it is now."""
        qemu, plugin, kind = self._qemu or (None, None, None)
        return VmView(
            name=self.name,
            uuid=None,
            socket=self._socket,
            state=self.state,
            since=self._since,
            trouble=self._trouble_now,
            qemu_version=qemu,
            plugin_version=plugin,
            vm_kind=kind,
            policy=self._table.policy.name,
            parameters=self._table.policy.parameters,
            fallen_back="it raised" if self._failed else None,
            budget_bytes=self._table.budget,
            stale_bytes={copy: self._ledger.stale(copy).bytes for copy in Copy},
            stats=self.stats.snapshot(),
        )

    async def run(self) -> None:
        """Attach, serve, and begin again with a growing pause, until cancelled."""
        pause = BACKOFF_FIRST
        while True:
            begun_s = time.monotonic()
            monitor = Monitor(self._socket)
            try:
                self._to(State.CONNECTING)
                await monitor.connect()
                await self._attach_and_serve(monitor)
            except PluginMissingError as error:
                if self.state is not State.REFUSED:
                    self._to(State.REFUSED)
                self._trouble("refused", error)
                pause = REFUSED_SECONDS
            except PeerError as error:
                if self.state is State.ATTACHED and time.monotonic() > begun_s + BACKOFF_MOST:
                    pause = BACKOFF_FIRST
                self._trouble("lost", error)
                self._to(State.BACKOFF)
            finally:
                await monitor.close()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - only jitter
            pause = min(2 * pause, BACKOFF_MOST)

    def _trouble(self, event: str, error: PeerError) -> None:
        """Say it once, however often it is tried: a VM may be off for weeks."""
        self._trouble_now = Trouble(error=error.message, hint=error.hint)
        if (event, error.message) != self._said:
            log.warning(event, vm=self.name, error=error.message, hint=error.hint)
            self._telemetry.line(event, error=error.message, hint=error.hint)
        self._said = (event, error.message)

    def _to(self, state: State) -> None:
        if state is not self.state:
            log.debug("state", vm=self.name, was=self.state, now=state)
            self._since = time.time()
        self.state = state

    async def _attach_and_serve(self, monitor: Monitor) -> None:
        missing = COMMANDS - await monitor.command_names()
        if missing:
            raise PluginMissingError(
                "this QEMU runs without the plugin",
                hint=f"start QEMU with {plugin_env()} ('qmp-upm plugin env' prints it)",
            )
        exits = PluginExits(monitor)
        query = await exits.query()
        if query.protocol != PROTOCOL:
            raise MessageError(
                f"the plugin speaks protocol {query.protocol}, this daemon {PROTOCOL}",
                hint="restart the VM with the plugin of this release",
            )
        backend = KvmAttributes(
            monitor,
            Settings(
                self._table.budget,
                int(self._table.lease * 1000),
                max(1, int(self._table.notify * 1000)),
            ),
            random.getrandbits(40) << 20,
            time.monotonic,
        )
        decision = self._decide(Batch())
        exits.start(query.records.head)
        await backend.configure(decision.defer)
        await self._resync(exits)
        self._to(State.ATTACHED)
        self._said = None
        self._trouble_now = None
        self._qemu = (monitor.qemu_version, query.version, query.vm_kind)
        log.info(
            "attached",
            vm=self.name,
            qemu=monitor.qemu_version,
            vm_kind=query.vm_kind,
            policy=self._table.policy.name,
        )
        self._telemetry.line(
            "attached",
            qemu=monitor.qemu_version,
            plugin=query.version,
            vm_kind=query.vm_kind,
            counters=query.counters,
        )
        try:
            await self._serve(monitor, exits, backend)
        except asyncio.CancelledError:
            await self._leave(monitor, exits, backend)
            raise

    async def _resync(self, exits: PluginExits) -> None:
        query: Query = await exits.query()
        self._ledger.replace(await exits.read_stale(query), time.monotonic_ns())
        self._ledger.forget_regions_but({region.id for region in query.regions})
        self._telemetry.line("resync", stale_bytes=self._ledger.stale_bytes)

    async def _serve(self, monitor: Monitor, exits: PluginExits, backend: KvmAttributes) -> None:
        while True:
            events = await monitor.wait_events(self._wait_seconds(exits))
            if monitor.take_dropped_events():
                await self._resync(exits)
            for event in events:
                await self._on_event(event, exits, backend)
            batch = await exits.read()
            self._follow(batch, exits)
            if batch.dropped:
                await self._resync(exits)
            decision = self._decide(batch)
            if decision.defer != backend.deferred:
                await backend.configure(decision.defer)
            self._submit(decision, backend)
            refused = await backend.pump()
            for request, error in refused:
                self._telemetry.line("discard-refused", id=request.id, error=error.message)
            if refused:
                await self._resync(exits)

    def _wait_seconds(self, exits: PluginExits) -> float:
        if not exits.drained:
            return 0.0
        wait = self._table.lease / 3
        if self._wake_ns is not None:
            wait = min(wait, (self._wake_ns - time.monotonic_ns()) / NSEC)
        return max(wait, 0.001)

    async def _on_event(self, event: Event, exits: PluginExits, backend: KvmAttributes) -> None:
        if event.event == "X_UPM_DISCARDED":
            self._on_discarded(read_message(Discarded, event.data), backend)
        elif event.event == "X_UPM_LEASE_EXPIRED":
            log.warning("lease-expired", vm=self.name, hint="this daemon was too slow, or stopped")
            await backend.configure(backend.deferred or frozenset())
            await self._resync(exits)

    def _on_discarded(self, done: Discarded, backend: KvmAttributes) -> None:
        request = backend.complete(done)
        if request is None:
            return
        self._totals["discarded_bytes"] += done.discarded
        self._telemetry.line(
            "discard",
            id=done.id,
            copy=request.discard.copy,
            discarded_bytes=done.discarded,
            skipped_bytes=done.skipped,
            error=done.error,
            total_discarded_bytes=self._totals["discarded_bytes"],
        )

    def _follow(self, batch: Batch, exits: PluginExits) -> None:
        if not len(batch) and not batch.dropped:
            return
        now_ns = time.monotonic_ns()
        self.batches.put(Block(batch.records, batch.dropped, now_ns))
        applied = self._ledger.apply(batch.records, now_ns)
        conversions = int(batch.records["count"].sum())
        to_private = batch.records["private"] == 1
        self._totals["conversions"] += conversions
        self._telemetry.line(
            "batch",
            cursor=exits.cursor,
            records=len(batch),
            conversions=conversions,
            to_private_bytes=int(batch.records["size"][to_private].sum()),
            to_shared_bytes=int(batch.records["size"][~to_private].sum()),
            deferred_bytes=applied.deferred_bytes,
            reused_bytes=applied.reused_bytes,
            dropped=batch.dropped,
            stale_bytes=self._ledger.stale_bytes,
            total_conversions=self._totals["conversions"],
        )

    def _decide(self, batch: Batch) -> Decision:
        """The policy's decision; once it has failed, eager for good."""
        if self._failed:
            return self._eager()
        try:
            decision = checked(
                self._policy.decide(batch, self._ledger, time.monotonic_ns(), Pressure())
            )
        except Exception as error:  # a policy is anybody's code: whatever it raises is contained
            hint = error.hint if isinstance(error, PolicyError) else "tell the policy's author"
            log.exception(
                "fallback",
                vm=self.name,
                policy=self._table.policy.name,
                error=repr(error),
                hint=hint,
            )
            self._telemetry.line("fallback", policy=self._table.policy.name, error=repr(error))
            self._failed = True
            return self._eager()
        self._wake_ns = decision.wake_at_ns
        return decision

    def _eager(self) -> Decision:
        # The plugin drains by itself what eager must not keep.
        self._wake_ns = None
        return Decision()

    def _submit(self, decision: Decision, backend: KvmAttributes) -> None:
        for discard in decision.discards:
            self._ledger.remove(discard.copy, discard.pages)
            for request in backend.submit(discard):
                self._telemetry.line(
                    "decision",
                    id=request.id,
                    copy=discard.copy,
                    bytes=request.bytes,
                    ranges=len(request.ranges),
                    reason=discard.reason,
                )

    async def _leave(self, monitor: Monitor, exits: PluginExits, backend: KvmAttributes) -> None:
        """Stopped by the operator: leave the VM as if we had never been here."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                while backend.busy:
                    for event in await monitor.wait_events(SETTLE_SECONDS):
                        await self._on_event(event, exits, backend)
                    await backend.pump()
        except (TimeoutError, PeerError):
            pass
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                self._follow(await exits.read(), exits)
                await backend.configure(frozenset())
                query = await exits.query()
                self._telemetry.line("detached", counters=query.counters)
        except (TimeoutError, PeerError) as error:
            log.warning(
                "not-left-cleanly",
                vm=self.name,
                error=str(error),
                hint="the plugin does the same by itself when the lease runs out",
            )
        self._to(State.STOPPED)
