# SPDX-License-Identifier: GPL-2.0-or-later
"""Fake VMs, each with a session of the daemon's, in the test's own event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qmp_upm.clock import Clock
from qmp_upm.config import VmSettings
from qmp_upm.events import HostEventName
from qmp_upm.guest import Admission
from qmp_upm.protocol import Copy
from qmp_upm.rotation import CappedDirectory
from qmp_upm.stats import PluginTotals, State, VmStats
from qmp_upm.telemetry import TelemetryWriter
from qmp_upm.testing import FakePlugin, FakeVm, Script
from qmp_upm.vm import Session

MIB = 1 << 20
PAGE = 4096
RAM = 64 * MIB
RING_RECORDS = 1024


@dataclass
class Served:
    """A VM and who serves it. ``states``: those that its session came into, in order."""

    vm: FakeVm
    plan: Script
    session: Session
    states: list[State] = field(default_factory=list)

    @property
    def attached(self) -> bool:
        """Whether it is served now."""
        return self.session.state is State.ATTACHED

    @property
    def counters(self) -> dict[str, int]:
        """The plugin's."""
        return self.vm.plugin.ledger.counters

    @property
    def reads(self) -> int:
        """How often the daemon has read."""
        return self.vm.counts["x-upm-read"]

    @property
    def discarded_bytes(self) -> int:
        """Given back because the daemon asked for it."""
        return sum(self.counters[f"requested-bytes-{copy}"] for copy in Copy)

    @property
    def followed(self) -> bool:
        """Whether the daemon has read all that was recorded."""
        ring = self.vm.plugin.ledger.ring
        return ring.sealed == ring.head

    def convert(self, megabyte: int, *, to_private: bool) -> None:
        """The guest converts one MiB."""
        self.vm.plugin.convert(1, megabyte * MIB, MIB, to_private=to_private)


class Fleet:
    """Starts VMs with their sessions; made by `running_fleet`."""

    def __init__(self, folder: Path, stack: contextlib.AsyncExitStack, clock: Clock) -> None:
        self.folder = folder
        self._clock = clock
        self._stack = stack
        self._writer = TelemetryWriter(CappedDirectory(folder, 1 << 20, 4 << 20))

    async def add(self, name: str, **settings: object) -> Served:
        """A VM, listening, and its session, under way. ``settings``: of its configuration."""
        plan = Script()
        clock_ns = self._clock.monotonic_ns
        plugin = FakePlugin({"ram": RAM}, clock_ns=clock_ns, ring_records=RING_RECORDS)
        vm = FakeVm(plugin, plan, name=name)
        socket = self.folder / f"{name}.monitor"
        await self._stack.enter_async_context(vm.listening(socket))
        table = VmSettings.model_validate({"notify": "1 ms", "lease": "60 s", **settings})
        admission = Admission(name, table, self._writer.of(name), PluginTotals(VmStats()))
        states: list[State] = []

        def note(event: HostEventName, data: Mapping[str, object]) -> None:
            if event is HostEventName.VM_STATE:
                states.append(State(str(data["state"])))

        session = Session(
            str(socket), admission, lambda _session, _identity: admission, note, self._clock
        )
        served = Served(vm, plan, session, states)
        task = asyncio.create_task(session.run(), name=name)
        self._stack.push_async_callback(self._end, task)
        return served

    def write_telemetry(self) -> None:
        """What the daemon's thread does with the lines."""
        self._writer.write_queued()

    async def _end(self, task: asyncio.Task[None]) -> None:
        assert not task.done(), task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def running_fleet(folder: Path, clock: Clock | None = None) -> AsyncIterator[Fleet]:
    """An empty fleet; at the end its sessions leave their VMs, and no task is left."""
    before = asyncio.all_tasks()
    async with contextlib.AsyncExitStack() as stack:
        yield Fleet(folder, stack, clock or Clock())
    await until(lambda: asyncio.all_tasks() <= before)


async def until(done: Callable[[], object], pause_s: float = 0.005) -> None:
    """Waits for it, looking every so often; a minute at most."""
    async with asyncio.timeout(60):
        while not done():  # noqa: ASYNC110 - states have no event to wait for
            await asyncio.sleep(pause_s)
