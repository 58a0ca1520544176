# SPDX-License-Identifier: GPL-2.0-or-later
"""All VMs of a host, and everything that an operator may ask of them.

The control socket, the metrics and the command line see the daemon through `Host` only. It runs in
the daemon's event loop. A VM's state is touched by its session's task alone: what changes a VM is
posted to that task, and the answer awaited for a bounded time.
"""

import asyncio
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import structlog

from qmp_upm.asks import Apply, Ask, Flush, SetBudget, SetPolicy
from qmp_upm.budget import Balancer, Claim
from qmp_upm.clock import Clock
from qmp_upm.config import Config, PolicyTable
from qmp_upm.configfile import load_config
from qmp_upm.credentials import ReadCredentials, read_credentials
from qmp_upm.discovery import DESERTED_SECONDS, MONITORS_MOST, Discovery
from qmp_upm.errors import ConfigError, UnavailableError
from qmp_upm.events import HostEvent, HostEventName, Publisher, Subscription
from qmp_upm.picture import Held, picture
from qmp_upm.pressure import PressureFiles, watch_pressure
from qmp_upm.protocol import Copy
from qmp_upm.roster import Roster
from qmp_upm.rotation import CappedDirectory
from qmp_upm.settings import Setting, configured
from qmp_upm.stats import State, VmView
from qmp_upm.supervision import Supervisor
from qmp_upm.telemetry import TelemetryWriter
from qmp_upm.threads import DaemonThreads
from qmp_upm.trace import Block
from qmp_upm.units import NSEC
from qmp_upm.vm import Session

__all__ = ["Host", "HostEvent", "HostEventName", "ReloadState", "Setting", "State", "Subscription"]

ASK_SECONDS = 15.0
"""How long a VM may take to do what is asked: an attempt to attach is not interrupted for it."""
FLUSH_SECONDS = 60.0
DIVIDE_SECONDS = 2.0
"""How long a command waits for the parts of the host's budget that it has changed."""
APPLY_SECONDS = 2.0
"""How long a reload waits for VMs; those that take longer follow when they can."""
REBALANCING = (HostEventName.VM_STATE, HostEventName.VM_ADDED, HostEventName.VM_REMOVED)

log = structlog.get_logger()


@dataclass(frozen=True)
class ReloadState:
    """What became of the last attempt to load the configuration.

    ``time``: of the last success, seconds since 1970. ``error``: None after a success.
    """

    successful: bool
    time: float
    error: str | None = None


class Host:
    """The daemon's API. Names are those of `vms`; an unknown one raises UnknownVmError."""

    def __init__(
        self,
        config: Config,
        clock: Clock | None = None,
        files: PressureFiles | None = None,
        read_credentials: ReadCredentials = read_credentials,
    ) -> None:
        self._clock = clock or Clock()
        self._files = files or PressureFiles()
        self.config = config
        self.reload_state = ReloadState(successful=True, time=self._clock.wall())
        self.events: Publisher[HostEvent] = Publisher()
        self.supervisor = Supervisor(self._clock)
        where = config.telemetry
        self.telemetry = TelemetryWriter(
            CappedDirectory(where.directory, where.file_size, where.total_size), self.supervisor
        )
        self.roster = Roster(
            lambda: self.config,
            self.telemetry,
            self._publish,
            self._clock,
            supervisor=self.supervisor,
            read_credentials=read_credentials,
        )
        self._balancer = Balancer(
            self.roster.sessions,
            lambda: self.config.host.budget,
            self._clock,
            lambda: Claim(self.config.defaults.weight, self.config.defaults.budget),
        )
        self._discovery = Discovery()
        self._looked = self._full = False
        self._reloading, self._looking = asyncio.Lock(), asyncio.Lock()

    @property
    def sessions(self) -> Iterable[Session]:
        """All of them, to look at."""
        return self.roster.sessions()

    @property
    def ready(self) -> bool:
        """Whether all VMs that there were at the start have been tried."""
        states = (session.state for session in self.sessions)
        return self._looked and State.CONNECTING not in states

    def start(self) -> None:
        """Begin to look after the VMs that the configuration names. `run` does the rest."""
        for name, socket in self.config.static.items():
            self.roster.add(socket, name)

    async def run(self) -> None:
        """Find VMs and follow what changes until cancelled; then leave them all fail-safe."""
        try:
            async with asyncio.TaskGroup() as tasks:
                keep = self.supervisor.keep
                tasks.create_task(keep("discovery", self._discover))
                tasks.create_task(keep("balancer", self._balancer.run))
                tasks.create_task(keep("pressure", self._watch_pressure))
        finally:
            await self.roster.remove(*self.roster.sessions())
            self.events.close()

    def vms(self) -> list[VmView]:
        """All VMs, by name."""
        return [self.roster[name].view() for name in sorted(self.roster.by_name)]

    def vm(self, name: str) -> VmView:
        """One VM."""
        return self.roster[name].view()

    async def set_policy(self, name: str, policy: str, parameters: Mapping[str, object]) -> None:
        """Swap a VM's policy; the ledger stays.

        ConfigError if there is no such policy, or not with these parameters. UnavailableError if
        the VM does not answer in time.
        """
        session = self.roster[name]
        if "name" in parameters:
            raise ConfigError(
                "a policy has no parameter 'name'", hint="the policy is named by itself"
            )
        table = PolicyTable.model_validate({"name": policy} | dict(parameters))
        table.factory()
        await self._ask(session, SetPolicy(table), ASK_SECONDS)

    async def set_budget(self, name: str, budget_bytes: int | None) -> dict[str, int]:
        """Change a VM's budget; None goes back to the configuration's.

        Returns what applies now, ``budget``, which its part of the host's budget may hold below its
        ``own``, both in bytes.
        """
        if budget_bytes is not None and not 0 <= budget_bytes < 1 << 63:
            raise ConfigError(f"a budget of {budget_bytes} bytes", hint="0 or more, below 2^63")
        session = self.roster[name]
        await self._ask(session, SetBudget(budget_bytes), ASK_SECONDS)
        await self._balancer.divide_anew(DIVIDE_SECONDS)
        guest = session.guest
        return {"budget": guest.budget_bytes, "own": guest.own_budget_bytes}

    async def flush(self, name: str, copy: Copy | None = None) -> int:
        """Give a VM's stale copies back now, of one side or both; returns the bytes.

        UnavailableError if the VM is not attached, or does not finish in time.
        """
        return await self._ask(self.roster[name], Flush(copy), FLUSH_SECONDS)

    async def reload(self) -> None:
        """Load the configuration anew. ConfigError: nothing has changed."""
        async with self._reloading:
            try:
                config = await asyncio.to_thread(self._load)
            except ConfigError as error:
                self.reload_state = replace(
                    self.reload_state, successful=False, error=error.message
                )
                log.error("reload-failed", error=error.message, hint=error.hint)  # noqa: TRY400 - an operator's error
                self._publish(
                    HostEvent(HostEventName.CONFIG_REJECTED, None, {"error": error.message})
                )
                raise
            await self._take(config)
            self.reload_state = ReloadState(successful=True, time=self._clock.wall())
            log.info("reloaded", vms=len(self.roster.by_name))
            self._publish(HostEvent(HostEventName.CONFIG_RELOADED, None))

    def config_of(self, name: str) -> list[Setting]:
        """What applies to a VM, and from where."""
        guest = self.roster[name].guest
        settings = {setting.key: setting for setting in configured(self.config, name)}
        if guest.chosen_policy is not None:
            value = guest.chosen_policy.model_dump(mode="json")
            settings["policy"] = Setting("policy", value, "command set-policy")
        if guest.chosen_budget is not None:
            settings["budget"] = Setting("budget", guest.chosen_budget, "command set-budget")
        if guest.share is not None:
            settings["share"] = Setting("share", guest.share, "part of [host] budget")
        return list(settings.values())

    def held_by(self, name: str) -> list[Held]:
        """What a VM holds as the daemon knows it, by copy and region."""
        return picture(self.roster[name].guest.ledger)

    def subscribe(self) -> Subscription[HostEvent]:
        """The events from now on."""
        return self.events.subscribe()

    def record(self, name: str) -> Subscription[Block]:
        """A VM's conversions from now on; close it to stop."""
        return self.roster[name].guest.batches.subscribe()

    def _publish(self, event: HostEvent) -> None:
        self.events.put(event)
        if event.name in REBALANCING:
            self._balancer.want()

    async def _ask(self, session: Session, ask: Ask, seconds: float) -> int:
        try:
            async with asyncio.timeout(seconds):
                return await session.ask(ask)
        except TimeoutError as error:
            raise UnavailableError(
                f"{session.name} did not do it within {seconds:.0f} s: {session.state}",
                hint="the log says what is the matter with it; nothing has been changed",
            ) from error

    async def _watch_pressure(self) -> None:
        await watch_pressure(
            self._files, self.roster.sessions, lambda: self.config.host.pressure_interval
        )

    async def _discover(self) -> None:
        while True:
            await self._look()
            self._looked = True
            await asyncio.sleep(self.config.host.discovery_interval)

    async def _look(self, before: Mapping[str, str] | None = None) -> None:
        """Serve the VMs that tables and globs name now, and leave others.

        After a reload: ``before`` are the sockets that the tables had, by name.
        """
        async with self._looking:
            static = {socket: name for name, socket in self.config.static.items()}
            for session in self.roster.sessions():
                if session.socket not in static and self._is_deserted(session):
                    self._discovery.desert(session.socket)
            changes = await asyncio.get_running_loop().run_in_executor(
                DaemonThreads("discovery"), self._discovery.look, self.config.discovery, static
            )
            full, self._full = self._full, changes.full
            if changes.full and not full:
                log.error(
                    "too-many-monitors",
                    most=MONITORS_MOST,
                    hint="make the globs of 'discovery' find monitors only; the rest is not served",
                )
            await self.roster.remove(
                *(
                    session
                    for session in self.roster.sessions()
                    if self._is_gone(session, static)
                    or (before is not None and _is_misnamed(session, static, before))
                )
            )
            served = {session.socket: session for session in self.roster.sessions()}
            for socket in (*static, *sorted(self._discovery.found - static.keys())):
                if socket not in served:
                    self.roster.add(socket, static.get(socket))
            for socket in served.keys() & set(changes.renewed):
                served[socket].hurry()

    def _is_deserted(self, session: Session) -> bool:
        """Whether its QEMU has ended, and left its socket behind."""
        since_ns = session.nobody_since_ns
        waited_ns = int(DESERTED_SECONDS * NSEC)
        return since_ns is not None and self._clock.monotonic_ns() - since_ns >= waited_ns

    def _is_gone(self, session: Session, static: Container[str]) -> bool:
        """Whether nothing names its socket, and it is not served any longer.

        A socket may be removed under a connection that goes on.
        """
        if session.socket in static or session.socket in self._discovery.found:
            return False
        named = any(fnmatchcase(session.socket, glob) for glob in self.config.discovery)
        return session.state is not State.ATTACHED or not named

    def _load(self) -> Config:
        if self.config.origins.main is None:
            raise ConfigError("the configuration is from no file", hint="start with --config")
        config = load_config(self.config.origins.main)
        for key in ("telemetry", "control", "metrics"):
            if getattr(config, key) != getattr(self.config, key):
                log.warning("not-reloaded", table=key, hint="restart the daemon for this table")
                config = config.model_copy(update={key: getattr(self.config, key)})
        return config

    async def _take(self, config: Config) -> None:
        """Make it so: VMs that it no longer names are left, new ones come, others are changed."""
        before, self.config = self.config.static, config
        await self._look(before)
        answers = [
            session.ask(Apply(config.settings_of(session.name)))
            for session in self.roster.sessions()
        ]
        if answers:
            await asyncio.wait(answers, timeout=APPLY_SECONDS)
        self._balancer.want()


def _is_misnamed(session: Session, static: Mapping[str, str], before: Mapping[str, str]) -> bool:
    """Whether it is to be called otherwise after a reload: it is left, and met again.

    ``static``: the tables' names by socket now; ``before``: sockets by name until now.
    """
    name = session.name
    if session.socket in static:
        return name != static[session.socket]
    if name in static.values():
        return True
    by_table = before.get(name) == session.socket
    return by_table and session.identity.wanted_name(session.socket) != name
