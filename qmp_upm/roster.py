# SPDX-License-Identifier: GPL-2.0-or-later
"""The sessions of a host, each with a task and a name of its own."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping

import structlog

from qmp_upm.clock import Clock
from qmp_upm.config import Config
from qmp_upm.credentials import ReadCredentials, read_credentials
from qmp_upm.errors import OtherMonitorError, UnknownVmError
from qmp_upm.events import HostEvent, HostEventName
from qmp_upm.guest import Admission
from qmp_upm.identity import Identity, unique
from qmp_upm.stats import PluginTotals, VmStats
from qmp_upm.supervision import Supervisor
from qmp_upm.telemetry import TelemetryWriter
from qmp_upm.vm import Session

LEAVE_SECONDS = 4.0
"""How long VMs may take to be left, all at the same time."""
REMEMBERED_MOST = 1024
"""Names of VMs that are gone whose counters go on when they are back."""

log = structlog.get_logger()


class Roster:
    """Sessions by name. ``config`` says what applies to one; ``publish`` is told what happens."""

    def __init__(
        self,
        config: Callable[[], Config],
        telemetry: TelemetryWriter,
        publish: Callable[[HostEvent], None],
        clock: Clock,
        *,
        supervisor: Supervisor,
        read_credentials: ReadCredentials = read_credentials,
    ) -> None:
        self.by_name: dict[str, Session] = {}
        self._config = config
        self._telemetry = telemetry
        self._publish = publish
        self._clock = clock
        self._supervisor = supervisor
        self._read_credentials = read_credentials
        self._tasks: dict[Session, asyncio.Task[None]] = {}
        self._totals: OrderedDict[str, PluginTotals] = OrderedDict()

    def __getitem__(self, name: str) -> Session:
        """The session of this name. UnknownVmError if there is none."""
        if name not in self.by_name:
            known = ", ".join(sorted(self.by_name)[:8]) or "none"
            raise UnknownVmError(f"there is no VM {name!r}", hint=f"known: {known}")
        return self.by_name[name]

    def sessions(self) -> list[Session]:
        """All of them."""
        return list(self.by_name.values())

    def add(self, socket: str, name: str | None = None) -> Session:
        """Look after the VM behind this monitor; without a name, it is asked for its own."""
        if name is None:
            name = self._free_name(Identity().wanted_name(socket), socket)
        session = Session(
            socket,
            self._admission(name),
            self._admit,
            lambda event, data: self._tell(session, event, data),
            self._clock,
            read_credentials=self._read_credentials,
        )
        if self._config().host.budget is not None:
            session.guest.share = 0
            session.guest.set_budget()
        self.by_name[name] = session
        self._tasks[session] = asyncio.create_task(
            self._supervisor.keep("session", session.run, lambda: session.name),
            name=f"vm {socket}",
        )
        self._publish(HostEvent(HostEventName.VM_ADDED, name, {"socket": socket}))
        return session

    async def remove(self, *sessions: Session) -> None:
        """Leave these VMs, fail-safe, and forget them."""
        tasks = [self._tasks.pop(session) for session in sessions]
        for session in sessions:
            del self.by_name[session.name]
        for task in tasks:
            task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=LEAVE_SECONDS)
            if late:
                log.error("not-left-in-time", vms=len(late), hint="their leases run out by itself")
        for session in sessions:
            session.guest.batches.close()
            self._remember(session.name, session.guest.totals)
            self._publish(HostEvent(HostEventName.VM_REMOVED, session.name))

    def _tell(self, session: Session, event: HostEventName, data: Mapping[str, object]) -> None:
        self._publish(HostEvent(event, session.name, data))

    def _admission(self, name: str) -> Admission:
        totals = self._totals.pop(name, None) or PluginTotals(VmStats())
        settings = self._config().settings_of(name)
        return Admission(name, settings, self._telemetry.of(name), totals)

    def _admit(self, session: Session, identity: Identity) -> Admission:
        """The configuration's name for its socket, else the one that it wants if nobody has it.

        With it comes what the configuration says now. OtherMonitorError if its process is served
        already.
        """
        self._claim(session)
        was, guest = session.name, session.guest
        del self.by_name[was]
        name = self._own_name(session.socket, identity)
        self.by_name[name] = session
        if name == was:
            settings = self._config().settings_of(name)
            return Admission(name, settings, guest.telemetry, guest.totals)
        self._remember(was, guest.totals)
        self._publish(HostEvent(HostEventName.VM_REMOVED, was, {"renamed": name}))
        self._publish(HostEvent(HostEventName.VM_ADDED, name, {"socket": session.socket}))
        return self._admission(name)

    def _claim(self, session: Session) -> None:
        """A process is served at one of its monitors: more would be more parts of the budget."""
        if session.peer.process <= 0:
            return
        for other in self.by_name.values():
            alive = other is not session and other.nobody_since_ns is None
            if alive and other.served == session.peer:
                raise OtherMonitorError(
                    f"this QEMU, process {session.peer.process}, is served as {other.name} at "
                    f"{other.socket}",
                    hint="give a QEMU one monitor for qmp-upm",
                )

    def _own_name(self, socket: str, identity: Identity) -> str:
        for name, static in self._config().static.items():
            if static == socket and name not in self.by_name:
                return name
        return self._free_name(identity.wanted_name(socket), socket)

    def _free_name(self, wanted: str, socket: str) -> str:
        """Names of the configuration's own VMs are not given to others."""
        return unique(wanted, socket, self.by_name.keys() | self._config().static.keys())

    def _remember(self, name: str, totals: PluginTotals) -> None:
        self._totals[name] = totals
        if len(self._totals) > REMEMBERED_MOST:
            self._totals.popitem(last=False)
