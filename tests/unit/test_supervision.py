# SPDX-License-Identifier: GPL-2.0-or-later
"""What serves all VMs dies of a defect, is begun again, and the VMs do not notice.

Real: the host and its tasks. Simulated: QEMU with the plugin, and the defects.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from qmp_upm.budget import Balancer
from qmp_upm.discovery import Discovery
from qmp_upm.pressure import PressureFiles
from qmp_upm.supervision import Supervisor
from qmp_upm.telemetry import TelemetryWriter
from tests.unit.hosts import FAST, hosting, states, write
from tests.unit.sessions import PAGE, fake_vm, until


def failing(patch: pytest.MonkeyPatch, owner: type, name: str, times: int) -> list[str]:
    """Has a method raise so often; returns what it was called for, in a list that grows."""
    works = getattr(owner, name)
    calls: list[str] = []

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) <= times:
            raise ZeroDivisionError(name)
        return works(*arguments, **named)

    patch.setattr(owner, name, call)
    return calls


@pytest.mark.traceback
@pytest.mark.parametrize(
    ("task", "owner", "name"),
    [
        ("discovery", Discovery, "look"),
        ("pressure", PressureFiles, "of_host"),
        ("balancer", Balancer, "balance"),
        ("telemetry", TelemetryWriter, "write_queued"),
    ],
)
async def test_a_task_of_the_host_is_begun_again(
    task: str, owner: type, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counted and logged with its traceback; VMs are served, and in the end it works."""
    monkeypatch.setattr("qmp_upm.supervision.RESTART_SECONDS", 0.01)
    calls = failing(monkeypatch, owner, name, 2)
    file = write(tmp_path, FAST)
    with capture_logs() as logged:
        async with (
            fake_vm(name="a").listening(tmp_path / "vms" / "a.monitor") as peer,
            hosting(file) as host,
        ):
            host.telemetry.start()
            await until(lambda: states(host) == {"a": "attached"})
            await until(lambda: len(calls) > 2)
            peer.plugin.convert(1, 0, PAGE, to_private=True)
            await until(lambda: host.vm("a").stats.followed_conversions == 1)
            assert host.supervisor.deaths == {task: 2}
            await host.telemetry.close(20)
    died = [line for line in logged if line["event"] == "task-died"]
    assert [(line["task"], line["log_level"]) for line in died] == [(task, "error")] * 2
    assert (tmp_path / "a.jsonl").exists()


@pytest.mark.traceback
async def test_pauses_grow_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect that stays costs a death a minute, not the processor."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 10:
            raise asyncio.CancelledError

    async def run() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("qmp_upm.supervision.asyncio.sleep", sleep)
    supervisor = Supervisor()
    with capture_logs(), pytest.raises(asyncio.CancelledError):
        await supervisor.keep("memory", run)
    assert supervisor.deaths == {"memory": 10}
    assert pauses[0] <= 1 < pauses[4] <= 16 < pauses[-1] <= 60
