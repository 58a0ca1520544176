# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM's session: find it, attach, serve it, and again after a break, until cancelled."""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable

from qmp_upm.asks import Apply, Ask, Flush, SetBudget, SetPolicy, SetShare
from qmp_upm.clock import Clock
from qmp_upm.credentials import Credentials, ReadCredentials, read_credentials
from qmp_upm.errors import (
    ExcessError,
    LinkError,
    MessageError,
    PeerError,
    QmpUpmError,
    RefusedError,
    SilentError,
    TakenError,
    UnavailableError,
)
from qmp_upm.events import HostEventName
from qmp_upm.guest import Admission, Guest, Tell
from qmp_upm.identity import Identity, identify
from qmp_upm.limits import PENALTY_SECONDS
from qmp_upm.policy import Pressure
from qmp_upm.protocol import Query
from qmp_upm.qmp import Monitor
from qmp_upm.serving import Serving
from qmp_upm.stats import State, Trouble, VmView
from qmp_upm.units import NSEC

BACKOFF_FIRST = 0.2
BACKOFF_MOST = 10.0
REFUSED_SECONDS = 5.0
"""Between two looks at a QEMU without the plugin: it can't get one while it runs."""
ASKS_MOST = 64
"""Of the host, that wait for the session."""

Admit = Callable[["Session", Identity], Admission]


class Session:
    """Serves the VM behind one monitor. One task runs it; nothing else touches its state.

    ``admit`` is told who QEMU says it is, and gives it a name and settings. Other tasks call
    `ask`, `feel`, `hurry` and `view`.
    """

    def __init__(
        self,
        socket: str,
        admission: Admission,
        admit: Admit,
        tell: Tell,
        clock: Clock,
        *,
        read_credentials: ReadCredentials = read_credentials,
    ) -> None:
        self.socket = socket
        self.state = State.CONNECTING
        self.guest = Guest(admission, tell, clock)
        self.identity = Identity()
        self.peer = Credentials(0, 0)
        self.served = Credentials(0, 0)
        """The process that is served here, and at no other monitor of its own."""
        self.held_until_ns = 0
        """When the plugin gives everything back by itself, at the latest; 0: nothing is held."""
        self._admit = admit
        self._read_credentials = read_credentials
        self._penalty = False
        self.nobody_since_ns: int | None = None
        """Since when nobody listens at the socket; None while somebody does."""
        self._clock = clock
        self._since = clock.wall()
        self._trouble: Trouble | None = None
        self._qemu_version: str | None = None
        self._plugin: Query | None = None
        self._asked: deque[tuple[Ask, asyncio.Future[int]]] = deque()
        self._woken = asyncio.Event()
        self._hurry = False
        self._serving: Serving | None = None
        self._attached_before = False

    @property
    def name(self) -> str:
        """What the VM is called at the moment."""
        return self.guest.name

    def view(self) -> VmView:
        """As it is now."""
        guest = self.guest
        guest.stats.lost_lines = guest.telemetry.lost_lines
        guest.stats.unrecorded = guest.batches.dropped
        return VmView(
            name=guest.name,
            uuid=self.identity.uuid,
            socket=self.socket,
            state=self.state,
            since=self._since,
            trouble=self._trouble,
            qemu_version=self._qemu_version,
            plugin_version=self._plugin.version if self._plugin else None,
            vm_kind=self._plugin.vm_kind if self._plugin else None,
            policy=guest.table.name,
            parameters=guest.table.parameters,
            fallen_back=guest.policy.fallen_back,
            budget_bytes=guest.budget_bytes,
            stale_bytes=dict(guest.stats.stale_bytes),
            remarks=guest.remarks,
            pressure_percent=guest.pressure.some_percent,
            stats=guest.stats.snapshot(),
        )

    def ask(self, ask: Ask) -> asyncio.Future[int]:
        """Have the session do this; a cancelled future is not done any more. Never waits."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if len(self._asked) >= ASKS_MOST:
            done.set_exception(
                UnavailableError(f"too much waits for {self.name}", hint="try again later")
            )
            return done
        self._asked.append((ask, done))
        self._wake()
        return done

    def feel(self, pressure: Pressure) -> None:
        """Memory pressure has changed enough to ask the policy again."""
        self.guest.pressure = pressure
        if self._serving is not None:
            self._serving.reconsider()

    def hurry(self) -> None:
        """The monitor is new: don't wait any longer before the next try."""
        self._hurry = True
        self._wake()

    def _wake(self) -> None:
        self._woken.set()
        if self._serving is not None:
            self._serving.wake()

    async def run(self) -> None:
        """Attach, serve, and begin again with a growing pause, until cancelled."""
        pause = BACKOFF_FIRST
        try:
            while True:
                begun_ns = self._clock.monotonic_ns()
                self._hurry = False
                await self._attempt()
                if self.state is State.REFUSED:
                    pause = REFUSED_SECONDS
                elif self._penalty:
                    pause = PENALTY_SECONDS
                elif self._served_since(begun_ns):
                    pause = BACKOFF_FIRST
                await self._pause(pause)
                pause = min(2 * pause, BACKOFF_MOST)
        finally:
            for _, done in self._asked:
                if not done.done():
                    done.set_exception(
                        UnavailableError(f"{self.name} is left", hint="query-vms lists who is not")
                    )
                    done.exception()  # nobody need be waiting for it any longer
            self._asked.clear()
            self._to(State.STOPPED)

    def _served_since(self, begun_ns: int) -> bool:
        """Whether this attempt attached, and lasted: a peer that breaks at once is not hammered."""
        lasted_ns = self._clock.monotonic_ns() - begun_ns
        return self.held_until_ns > begun_ns and lasted_ns > BACKOFF_MOST * NSEC

    async def _attempt(self) -> None:
        monitor = Monitor(self.socket, self._read_credentials)
        trouble: PeerError | None = None
        try:
            await monitor.connect()
            await self._serve(monitor)
        except PeerError as error:
            trouble = error
        finally:
            self._serving = None
            if not monitor.nobody:
                self.nobody_since_ns = None
            elif self.nobody_since_ns is None:
                self.nobody_since_ns = self._clock.monotonic_ns()
            broken = await monitor.close()
        if isinstance(broken, MessageError) and type(trouble) is LinkError:
            trouble = broken
        self._penalty = isinstance(trouble, ExcessError)
        if trouble is not None:
            self._stumble(trouble)

    async def _serve(self, monitor: Monitor) -> None:
        self._meet(monitor, await identify(monitor))
        serving = Serving(self.guest, monitor)
        self._reserve_share()
        try:
            query = await serving.attach()
            self._serving = serving
            self._on_attached(monitor, query)
            await serving.serve(lambda: self._answer(serving))
        except asyncio.CancelledError:
            await serving.leave()
            raise
        finally:
            lease_ns = int(self.guest.settings.lease * NSEC)
            self.held_until_ns = self._clock.monotonic_ns() + lease_ns

    def _meet(self, monitor: Monitor, identity: Identity) -> None:
        """Learn who it is. A process keeps the name that it gave first; another is another QEMU.

        Without a process to go by, another name is another QEMU.
        """
        same = monitor.peer == self.served and monitor.peer.process > 0
        if same:
            identity = self.identity
        self.peer = monitor.peer
        admission = self._admit(self, identity)
        another = not same and (identity, monitor.peer) != (self.identity, self.served)
        self._qemu_version = monitor.qemu_version
        self.identity, self.served = identity, monitor.peer
        self.guest.admit(admission)
        if another:
            self.guest.restarted()
            self._plugin = None

    def _reserve_share(self) -> None:
        """Without a lease from before, the VM has no part of the host's budget until it is given.

        From here on the host counts it as holding what it has.
        """
        guest = self.guest
        if guest.share is not None and self._clock.monotonic_ns() >= self.held_until_ns:
            guest.share = 0
            guest.set_budget()
        self.held_until_ns = 1 << 63

    def _on_attached(self, monitor: Monitor, query: Query) -> None:
        guest = self.guest
        guest.stats.reconnects += self._attached_before
        self._attached_before = True
        self._trouble = None
        self._plugin = query
        self._to(State.ATTACHED)
        guest.log.info(
            "attached",
            qemu=monitor.qemu_version,
            vm_kind=query.vm_kind,
            policy=guest.table.name,
        )
        guest.telemetry.line(
            "attached",
            qemu=monitor.qemu_version,
            plugin=query.version,
            vm_kind=query.vm_kind,
            counters=query.counters,
        )

    def _stumble(self, error: PeerError) -> None:
        """Note what is wrong, and say it once: a VM may be off for weeks."""
        states: dict[type[PeerError], State] = {
            TakenError: State.BUSY,
            SilentError: State.SILENT,
            LinkError: State.BACKOFF,
        }
        state = states.get(type(error), State.FAULTY)
        if isinstance(error, RefusedError):
            state = State.REFUSED
        if state is State.BUSY and self.state is State.SILENT:
            state = State.SILENT  # a stopped QEMU greets nobody either
        trouble = Trouble(error=error.message, hint=error.hint)
        if trouble != self._trouble or state is not self.state:
            event = "refused" if state is State.REFUSED else "lost"
            self.guest.log.warning(event, state=state, error=error.message, hint=error.hint)
            self.guest.telemetry.line(event, state=state, error=error.message, hint=error.hint)
        self._trouble = trouble
        self._to(state)

    def _to(self, state: State) -> None:
        if state is self.state:
            return
        was, self.state = self.state, state
        self._since = self._clock.wall()
        self.guest.tell(HostEventName.VM_STATE, state=state, was=was)

    async def _pause(self, seconds: float) -> None:
        """Wait, and meanwhile do what the host asks for."""
        clock = asyncio.get_running_loop().time
        until = clock() + self._clock.jittered(seconds)
        while not self._hurry and (left := until - clock()) > 0:
            await self._answer(None)
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, self._lease_left())):
                    await self._woken.wait()

    def _lease_left(self) -> float:
        """Seconds until the plugin of a VM that was lost gives all back; then nothing is held.

        A QEMU that is stopped does so when it goes on, and not before.
        """
        if self.state is State.SILENT or not any(self.guest.stats.stale_bytes.values()):
            return math.inf
        left_ns = self.held_until_ns - self._clock.monotonic_ns()
        if left_ns > 0:
            return left_ns / NSEC
        self.guest.forget()
        return math.inf

    async def _answer(self, serving: Serving | None) -> None:
        """Do what has been asked for, in order. What QEMU says to it may end the session."""
        while self._asked:
            ask, done = self._asked.popleft()
            if done.done():
                continue
            try:
                answer = await self._do(ask, serving, done)
            except PeerError as error:
                if not done.done():
                    done.set_exception(UnavailableError(error.message, hint=error.hint))
                raise
            except QmpUpmError as error:
                if not done.done():
                    done.set_exception(error)
                continue
            if answer is not None and not done.done():
                done.set_result(answer)

    async def _do(self, ask: Ask, serving: Serving | None, done: asyncio.Future[int]) -> int | None:
        """The answer; None if it comes later, through ``done``."""
        guest = self.guest
        if isinstance(ask, Flush):
            if serving is None:
                raise UnavailableError(
                    f"{guest.name} is not attached: {self.state}",
                    hint="query-vm and the log say why",
                )
            await serving.flush(ask.copy, done)
            return None
        if isinstance(ask, SetPolicy):
            guest.swap(ask.table)
            guest.chosen_policy = ask.table
        elif isinstance(ask, SetBudget):
            guest.chosen_budget = ask.budget_bytes
        elif isinstance(ask, SetShare):
            guest.share = ask.share_bytes
        elif isinstance(ask, Apply):
            guest.configure(ask.settings)
        guest.set_budget()
        if serving is None:
            return 0
        await serving.reconfigure()
        return await serving.drain_to(guest.budget_bytes) if isinstance(ask, SetShare) else 0
