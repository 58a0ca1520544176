# SPDX-License-Identifier: GPL-2.0-or-later
"""An attached VM: follow its conversions and do what its policy decides, until the link breaks.

A turn of the loop begins when the plugin has something to say, the policy wants to be asked, the
host has changed something, or the lease wants to be renewed, which a read does. A VM that does
nothing costs two to five reads in each lease.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from qmp_upm.backends import KvmAttributes, Request, Settings
from qmp_upm.errors import (
    MessageError,
    PeerError,
    PluginMissingError,
    UnavailableError,
)
from qmp_upm.events import HostEventName
from qmp_upm.exits import PluginExits
from qmp_upm.flushing import FlushUnderWay
from qmp_upm.guest import Guest
from qmp_upm.limits import RECOVER_SECONDS
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.policy import Batch, Discard
from qmp_upm.protocol import (
    COMMANDS,
    PROTOCOL,
    READ_MOST,
    RING_RECORDS,
    BudgetReached,
    Copy,
    Discarded,
    Event,
    Query,
)
from qmp_upm.qmp import Monitor
from qmp_upm.refresh import Refresh, in_company
from qmp_upm.stats import FEW_DISCARDS, FEW_SECONDS
from qmp_upm.units import NSEC

LEAVE_SECONDS = 2.5
"""What leaving a VM may take, beside all others that are left at the same time."""
SETTLE_SECONDS = 1.0
"""What of that the plugin may take with the discards that are under way."""
RESYNC_SECONDS = 60.0
"""The longest that reading the plugin's whole ledger may take."""
RANGES_LEAST = 1 << 18
"""Ranges of a ledger that are read whatever the budget."""
TURN_SECONDS = 0.002
"""The least time from one turn to the next, while the plugin has no backlog."""
DRAIN_SECONDS = 2.0
"""How long the plugin may take to give back what is above a smaller budget."""


class Serving:
    """One attachment to one VM. Raises PeerError when it is over."""

    def __init__(self, guest: Guest, monitor: Monitor) -> None:
        self._guest = guest
        self._monitor = monitor
        self._exits = PluginExits(monitor)
        self._backend = KvmAttributes(
            monitor,
            self._settings(),
            int(guest.clock.chance() * (1 << 40)) << 20,
            lambda: guest.clock.monotonic_ns() / NSEC,
        )
        self._flushes: list[FlushUnderWay] = []
        self._ask_policy = True
        self._turn_ns = guest.clock.monotonic_ns()
        self._renew_ns = self._next_renewal_ns()
        self._refresh = Refresh(guest.clock)
        self._expired = False
        self._recover_ns = 0

    def _settings(self) -> Settings:
        settings = self._guest.settings
        return Settings(
            self._guest.budget_bytes,
            max(1, int(settings.lease * 1000)),
            max(1, int(settings.notify * 1000)),
        )

    async def attach(self) -> Query:
        """Configure the plugin and read its ledger. PluginMissingError if there is none."""
        if COMMANDS - await self._monitor.command_names():
            raise PluginMissingError(
                "this QEMU runs without the plugin",
                hint="start QEMU with the LD_PRELOAD= that 'qmp-upm plugin env' prints",
            )
        query = await self._exits.query()
        if query.protocol != PROTOCOL:
            raise MessageError(
                f"the plugin speaks protocol {query.protocol}, this daemon {PROTOCOL}",
                hint="restart the VM with the plugin of this release",
            )
        self._exits.start(query.records.head)
        first = self._guest.decide(Batch())
        await self._configure(first.defer, first.hold_bytes)
        await self._resynchronise()
        return query

    async def serve(self, answer: Callable[[], Awaitable[None]]) -> None:
        """Turn after turn. ``answer`` does what the host has asked for meanwhile."""
        try:
            while True:
                await answer()
                await self._turn(await self._monitor.wait_events(self._wait_seconds()))
                await self._pace()
        finally:
            self._guest.policy.detached()
            for flush in self._flushes:
                if not flush.done.done():
                    flush.done.set_exception(
                        UnavailableError("the VM went away during the flush", hint="try again")
                    )

    def reconsider(self) -> None:
        """Ask the policy in the next turn, whatever has happened."""
        self._ask_policy = True
        self.wake()

    def wake(self) -> None:
        """Have the next turn begin now."""
        self._monitor.wake()

    async def reconfigure(self) -> None:
        """The settings or the budget have changed."""
        self._backend.settings = self._settings()
        await self._configure(self._backend.deferred or frozenset(), self._backend.hold_bytes)
        self.reconsider()

    async def _configure(self, defer: frozenset[Copy], hold_bytes: int | None) -> None:
        """Tell the plugin. What it gives back by itself for that, it tells nobody."""
        await self._backend.configure(defer, hold_bytes)
        self._refresh.want()

    async def drain_to(self, budget_bytes: int) -> int:
        """Wait until no more than that is stale, for a while; returns what is."""
        deadline_ns = self._guest.clock.monotonic_ns() + int(DRAIN_SECONDS * NSEC)
        pause_s = DRAIN_SECONDS / 100
        while True:
            stale = (await self._exits.query()).stale
            held = stale.private + stale.shared
            if held <= budget_bytes or self._guest.clock.monotonic_ns() >= deadline_ns:
                return held
            await asyncio.sleep(pause_s)
            pause_s *= 2  # there may be a thousand VMs that are asked this

    async def flush(self, copy: Copy | None, done: asyncio.Future[int]) -> None:
        """Discard what is stale now; ``done`` is told the bytes when the plugin has."""
        dropped = 0
        async for batch in self._backlog():
            dropped += batch.dropped
            if len(batch):
                await self._decide(batch)
        if dropped:
            await self._resynchronise()
        flush = FlushUnderWay(done)
        self._flushes.append(flush)
        for side in Copy if copy is None else (copy,):
            requests = self._submit(Discard(side, self._guest.ledger.stale(side), "flush"))
            flush.waiting |= {request.id for request in requests}
        flush.settle()
        self._ask_policy = True  # what it had planned for is gone, or read just now
        await self._pump()

    def _wait_seconds(self) -> float:
        if not self._exits.drained:
            return 0.0
        recover_ns = self._recover_ns if self._expired else None
        dues = (self._renew_ns, self._refresh.due_ns, self._guest.policy.wake_at_ns, recover_ns)
        due = min(ns for ns in dues if ns is not None)
        return max((due - self._guest.clock.monotonic_ns()) / NSEC, TURN_SECONDS)

    def _next_renewal_ns(self) -> int:
        return in_company(self._guest.clock, self._guest.settings.lease / 2)

    async def _pace(self) -> None:
        """A peer that sends events without end gets no more turns than others."""
        now_ns = self._guest.clock.monotonic_ns()
        left = TURN_SECONDS - (now_ns - self._turn_ns) / NSEC
        if self._exits.drained and left > 0:
            await asyncio.sleep(left)
        self._turn_ns = self._guest.clock.monotonic_ns()

    async def _turn(self, events: list[Event]) -> None:
        stale = self._monitor.take_dropped_events() > 0
        for event in events:
            self._on_event(event)
        self._expired |= any(event.event == "X_UPM_LEASE_EXPIRED" for event in events)
        if self._expired and self._guest.clock.monotonic_ns() >= self._recover_ns:
            await self._on_lease_expired()
            stale = True
        batch = Batch()
        if self._wants_read(events):
            batch = await self._exits.read()
            self._renew_ns = self._next_renewal_ns()
            self._follow(batch)
        if self._guest.overgrown() or stale or batch.dropped:
            await self._resynchronise()
        if self._wants_decision(batch):
            await self._decide(batch)
        await self._pump()
        await self._look()

    def _wants_read(self, events: list[Event]) -> bool:
        """Whether there is something to read, the lease to renew, or a decision to be made.

        The end of a discard is none of these.
        """
        return (
            any(event.event == "X_UPM_CONVERSIONS" for event in events)
            or not self._exits.drained
            or self._guest.clock.monotonic_ns() >= self._renew_ns
            or self._wants_decision(Batch())
        )

    def _wants_decision(self, batch: Batch) -> bool:
        wake_ns = self._guest.policy.wake_at_ns
        due = wake_ns is not None and self._guest.clock.monotonic_ns() >= wake_ns
        return self._ask_policy or due or len(batch) > 0 or batch.dropped > 0

    async def _decide(self, batch: Batch) -> None:
        self._ask_policy = False
        decision = self._guest.decide(batch)
        asked = self._backend.deferred, self._backend.hold_bytes
        if (decision.defer, decision.hold_bytes) != asked:
            await self._configure(decision.defer, decision.hold_bytes)
        for discard in decision.discards:
            self._submit(discard)

    def _submit(self, discard: Discard) -> list[Request]:
        ledger, deferred = self._guest.ledger, self._backend.deferred or frozenset()
        # Of a copy that is kept, more may become stale until the plugin comes to it.
        everything = discard.copy not in deferred and discard.pages == ledger.stale(discard.copy)
        ledger.remove(discard.copy, discard.pages)
        requests = self._backend.submit(discard, everything=everything)
        for request in requests:
            self._guest.telemetry.line(
                "decision",
                id=request.id,
                copy=discard.copy,
                bytes=request.bytes,
                ranges=0 if request.runs is None else len(request.runs.region),
                reason=discard.reason,
            )
        self._guest.count_stale()
        return requests

    async def _pump(self) -> None:
        refused = await self._backend.pump()
        for request, error in refused:
            self._guest.stats.failed_discards += 1
            self._guest.telemetry.line("discard-refused", id=request.id, error=error.message)
            for flush in self._flushes:
                flush.finish(request.id, 0)
        if refused:
            await self._resynchronise()

    async def _look(self) -> None:
        """Take the plugin's figures when it is time, and compare."""
        if not self._refresh.is_due:
            return
        query = await self._exits.query()
        self._take(query)
        quiet = query.records.head == self._exits.cursor and not self._backend.busy
        if quiet and self._guest.agrees(query):
            self._refresh.doubt = False
            self._refresh.on_well()
        elif quiet or self._refresh.doubt:
            if self._refresh.is_patient:
                await self._resynchronise()
                self._refresh.on_differs()
            self._refresh.want()

    def _take(self, query: Query) -> None:
        self._guest.take(query)
        held_bytes = query.stale.private + query.stale.shared + self._guest.ledger.stale_bytes
        self._refresh.taken(holds=held_bytes > 0)

    def _follow(self, batch: Batch) -> None:
        self._guest.stats.unlisted_records += self._exits.unlisted
        self._exits.unlisted = 0
        if len(batch) or batch.dropped:
            self._refresh.want()
            self._guest.follow(batch, self._exits.cursor)

    async def _backlog(self) -> AsyncIterator[Batch]:
        """Follow all that the plugin has on record by now, however fast the guest goes on."""
        for _ in range(RING_RECORDS // READ_MOST):
            batch = await self._exits.read()
            self._follow(batch)
            yield batch
            if self._exits.drained:
                return

    async def _resynchronise(self) -> None:
        """Read the plugin's ledger. MessageError if it has no end."""
        try:
            async with asyncio.timeout(RESYNC_SECONDS):
                query, stale = await self._exits.read_ledger(self._ranges_most())
        except TimeoutError as error:
            raise MessageError(
                f"the plugin's ledger was not read within {RESYNC_SECONDS:.0f} s",
                hint="the VM's QEMU or plugin is faulty; restart the VM",
            ) from error
        self._backend.take_out(stale)
        self._guest.resynchronise(stale, query)
        self._take(query)
        self._refresh.want()  # the guest went on meanwhile
        self._refresh.doubt = False
        self._ask_policy = True

    def _ranges_most(self) -> int:
        """Pages of the budget, and of what may still be on its way out.

        A ledger from the time of a larger budget fits at the next try: it has been drained then.
        """
        return max(RANGES_LEAST, 2 * self._guest.budget_bytes // PAGE_BYTES)

    def _on_event(self, event: Event) -> None:
        if isinstance(event.data, Discarded):
            self._on_discarded(event.data)
        elif isinstance(event.data, BudgetReached):
            self._refresh.want()
            self._guest.tell_rarely(
                HostEventName.BUDGET_REACHED, stale=event.data.stale, budget=event.data.budget
            )

    async def _on_lease_expired(self) -> None:
        self._expired = False
        self._recover_ns = self._guest.clock.monotonic_ns() + int(RECOVER_SECONDS * NSEC)
        self._guest.stats.lease_expiries += 1
        self._guest.warn_rarely("lease-expired", "this daemon was too slow, or stopped")
        self._guest.tell_rarely(HostEventName.LEASE_EXPIRED)
        await self._configure(self._backend.deferred or frozenset(), self._backend.hold_bytes)

    def _on_discarded(self, done: Discarded) -> None:
        request = self._backend.complete(done)
        if request is None:
            return
        stats, discard = self._guest.stats, request.discard
        self._refresh.want()
        if stats.discard_calls < FEW_DISCARDS:
            self._refresh.want_within(FEW_SECONDS)
        stats.count_discard(discard.copy, discard.reason, done.discarded, done.skipped)
        if done.error is not None:
            stats.failed_discards += 1
            self._refresh.on_failed()
        elif done.discarded:
            self._refresh.on_well()
        self._guest.telemetry.line(
            "discard",
            id=done.id,
            copy=discard.copy,
            discarded_bytes=done.discarded,
            skipped_bytes=done.skipped,
            error=done.error,
        )
        for flush in self._flushes:
            flush.finish(done.id, done.discarded)
        self._flushes = [flush for flush in self._flushes if flush.waiting]

    async def leave(self) -> None:
        """Stopped by the operator: leave the VM as if we had never been here."""
        if self._backend.deferred is None:
            return  # and so far we have not
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._backend.configure(frozenset())
                await self._settle()
                async for _ in self._backlog():
                    pass
                query = await self._exits.query()
                self._take(query)
                self._guest.telemetry.line("detached", counters=query.counters)
        except (TimeoutError, PeerError) as error:
            self._guest.log.warning(
                "not-left-cleanly",
                error=str(error) or f"not done within {LEAVE_SECONDS} s",
                hint="the plugin does the same by itself when the lease runs out",
            )

    async def _settle(self) -> None:
        """Hear what became of the discards that are under way, if that does not take long."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                while self._backend.busy:
                    for event in await self._monitor.wait_events(SETTLE_SECONDS):
                        self._on_event(event)
                    await self._backend.pump()
        except TimeoutError:
            self._guest.log.info("discards-under-way")
