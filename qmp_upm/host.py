# SPDX-License-Identifier: GPL-2.0-or-later
"""All VMs of a host, and everything that an operator may ask of them.

The control socket, the metrics and the command line see the daemon through `Host` only. It runs in
the daemon's event loop. A VM's state is touched by its session's task alone: what changes a VM is
posted to that task, and the answer awaited for a bounded time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qmp_upm.config import Config
from qmp_upm.errors import UnavailableError, UnknownVmError
from qmp_upm.events import HostEvent, HostEventName, Publisher, Subscription
from qmp_upm.protocol import Copy
from qmp_upm.rotation import CappedDirectory
from qmp_upm.settings import Setting, configured
from qmp_upm.stats import State, VmView
from qmp_upm.telemetry import TelemetryWriter
from qmp_upm.trace import Block
from qmp_upm.vm import Session

__all__ = ["Host", "HostEvent", "HostEventName", "ReloadState", "Setting", "State", "Subscription"]


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

    def __init__(self, config: Config, started: float) -> None:
        self.config = config
        self.reload_state = ReloadState(successful=True, time=started)
        self._sessions: dict[str, Session] = {}
        self._events: Publisher[HostEvent] = Publisher()
        where = config.telemetry
        self.telemetry = TelemetryWriter(
            CappedDirectory(where.directory, where.file_size, where.total_size)
        )
        for name, socket in config.static.items():
            settings = config.settings_of(name)
            self._sessions[name] = Session(name, socket, settings, self.telemetry.of(name))

    @property
    def sessions(self) -> Iterable[Session]:
        """For the daemon, which runs them."""
        return self._sessions.values()

    def vms(self) -> list[VmView]:
        """All VMs, by name."""
        return [self._sessions[name].view() for name in sorted(self._sessions)]

    def vm(self, name: str) -> VmView:
        """One VM."""
        return self._session(name).view()

    async def set_policy(self, name: str, policy: str, parameters: Mapping[str, object]) -> None:
        """Swap a VM's policy; the ledger stays.

        ConfigError if there is no such policy, or not with these parameters.
        """
        raise self._unavailable(name, f"set the policy {policy} with {len(parameters)} parameters")

    async def set_budget(self, name: str, budget_bytes: int | None) -> None:
        """Change a VM's budget; None goes back to the configuration's."""
        raise self._unavailable(name, f"set the budget to {budget_bytes}")

    async def flush(self, name: str, copy: Copy | None = None) -> int:
        """Give a VM's stale copies back now, of one side or both; returns the bytes.

        UnavailableError if the VM is not attached, or does not finish in time.
        """
        raise self._unavailable(name, f"flush {copy or 'both copies'}")

    async def reload(self) -> None:
        """Load the configuration anew. ConfigError: nothing has changed."""
        raise UnavailableError("the daemon can't reload", hint="restart it")

    def config_of(self, name: str) -> list[Setting]:
        """What applies to a VM, and from where."""
        self._session(name)
        return configured(self.config, name)

    def subscribe(self) -> Subscription[HostEvent]:
        """The events from now on."""
        return self._events.subscribe()

    def record(self, name: str) -> Subscription[Block]:
        """A VM's conversions from now on; close it to stop."""
        return self._session(name).batches.subscribe()

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            known = ", ".join(sorted(self._sessions)[:8]) or "none"
            raise UnknownVmError(f"there is no VM {name!r}", hint=f"known: {known}")
        return self._sessions[name]

    def _unavailable(self, name: str, what: str) -> UnavailableError:
        self._session(name)
        return UnavailableError(f"cannot {what} of {name}", hint="restart the daemon")
