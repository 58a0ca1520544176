# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests of sessions and of the host share: a session without a host, and waiting."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmp_upm.clock import Clock
from qmp_upm.config import VmSettings
from qmp_upm.events import HostEventName
from qmp_upm.guest import Admission
from qmp_upm.rotation import CappedDirectory
from qmp_upm.stats import PluginTotals, VmStats
from qmp_upm.telemetry import TelemetryWriter
from qmp_upm.testing import FakePlugin, FakeVm
from qmp_upm.testing.faults import Plan
from qmp_upm.vm import Session

MIB = 1 << 20
PAGE = 4096
CLOCK = Clock(chance=lambda: 0.5)


def fake_vm(plan: Plan | None = None, **names: str) -> FakeVm:
    """A VM with 64 MiB of RAM in one region, number 1."""
    return FakeVm(FakePlugin({"ram": 64 * MIB}), plan, **names)


async def until(done: Callable[[], object]) -> None:
    """Waits for it, twenty seconds at most."""
    async with asyncio.timeout(20):
        while not done():  # noqa: ASYNC110 - states have no event to wait for
            await asyncio.sleep(0.002)


@dataclass
class Running:
    """A session at work, the task it has, and what it tells."""

    session: Session
    task: asyncio.Task[None]
    told: list[tuple[HostEventName, Mapping[str, object]]] = field(default_factory=list)

    def lines(self) -> str:
        """The session's telemetry up to now."""
        telemetry = self.session.guest.telemetry
        telemetry._writer.write_queued()
        return telemetry.path.read_text(encoding="utf-8") if telemetry.path.exists() else ""


@contextlib.asynccontextmanager
async def running(tmp_path: Path, clock: Clock = CLOCK, **settings: Any) -> AsyncIterator[Running]:
    """A session with the monitor at tmp_path/sock."""
    values = {"notify": "1 ms", "lease": "0.5 s"} | settings
    telemetry = TelemetryWriter(CappedDirectory(tmp_path, 1 << 20, 4 << 20)).of("guest")
    admission = Admission(
        "guest", VmSettings.model_validate(values), telemetry, PluginTotals(VmStats())
    )
    told: list[tuple[HostEventName, Mapping[str, object]]] = []
    session = Session(
        str(tmp_path / "sock"),
        admission,
        lambda _session, _identity: admission,
        lambda name, data: told.append((name, data)),
        clock,
    )
    task = asyncio.create_task(session.run())
    try:
        yield Running(session, task, told)
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
