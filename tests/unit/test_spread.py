# SPDX-License-Identifier: GPL-2.0-or-later
"""What many sessions do by themselves comes a few at a time, and not later than it must."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

from qmp_upm.asks import Apply
from qmp_upm.config import VmSettings
from qmp_upm.refresh import COMPANIES, REFRESH_SECONDS
from tests.unit.fleet import Served, running_fleet, until
from tests.unit.virtualtime import VirtualLoop, run_in_virtual_time

VMS = 24
LEASE = 30.0
WINDOW = 0.1


async def told(folder: Path, command: str, seconds: float, *, convert: bool) -> list[list[int]]:
    """How often each VM was told this, in each WINDOW of so many seconds."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    clock = replace(loop.clock, chance=random.Random(3).random)  # noqa: S311 - repeatable
    async with running_fleet(folder, clock) as made:
        fleet = [await made.add(f"vm-{i}", lease=f"{LEASE} s") for i in range(VMS)]
        await until(lambda: all(served.attached for served in fleet))
        before = counts(fleet, command)
        for served in fleet if convert else ():
            served.convert(0, to_private=True)
        windows = []
        for _ in range(round(seconds / WINDOW)):
            await asyncio.sleep(WINDOW)
            now = counts(fleet, command)
            windows.append([b - a for a, b in zip(before, now, strict=True)])
            before = now
        assert not any(served.counters["lease-expiries"] for served in fleet)
    return windows


def counts(fleet: list[Served], command: str) -> list[int]:
    """How often each VM was told this so far."""
    return [served.vm.counts[command] for served in fleet]


def test_counters_are_refreshed_in_companies(tmp_path: Path) -> None:
    """VMs that convert at the same time are asked for their counters a few at a time."""
    windows = run_in_virtual_time(told(tmp_path, "x-upm-query", REFRESH_SECONDS + 1, convert=True))
    assert [sum(window[i] for window in windows) for i in range(VMS)] == [1] * VMS
    assert max(map(sum, windows)) <= VMS // 3
    assert sum(map(any, windows)) <= COMPANIES // 2 + 1


def test_leases_are_renewed_in_companies(tmp_path: Path) -> None:
    """VMs that attached at the same time and do nothing are read a few at a time."""
    windows = run_in_virtual_time(told(tmp_path, "x-upm-read", 2 * LEASE, convert=False))
    reads = [sum(window[i] for window in windows) for i in range(VMS)]
    assert min(reads) >= 3
    assert max(reads) <= 10
    assert max(map(sum, windows)) <= VMS // 3
    assert sum(map(any, windows)) <= 2 * LEASE / (LEASE / 2 / COMPANIES)


def test_shorter_lease_is_renewed_in_time(tmp_path: Path) -> None:
    """The next read was due by the lease from before."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        async with running_fleet(tmp_path, loop.clock) as made:
            served = await made.add("vm", lease="1000 s")
            await until(lambda: served.attached)
            settings = VmSettings.model_validate({"notify": "1 ms", "lease": "3 s"})
            await served.session.ask(Apply(settings))
            await asyncio.sleep(60)
            assert served.vm.plugin.worker.lease_ms == 3000
            assert served.counters["lease-expiries"] == 0

    run_in_virtual_time(main())
