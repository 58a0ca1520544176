# SPDX-License-Identifier: GPL-2.0-or-later
"""Half an hour of mixed load, on a clock that jumps: memory, files and tasks stay flat."""

import asyncio
import contextlib
import gc
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from qmp_upm.testing import Close, Delay, Drop, Fault, Flood, Garbage, Split
from tests.unit.fleet import MIB, PAGE, Fleet, Served, running_fleet, until
from tests.unit.virtualtime import VirtualLoop, run_in_virtual_time

MINUTES = 30
WARM_MINUTES = 5
VMS = 4
BUDGET = 4 * MIB
GROWTH_MOST = 2 * MIB
FAULTS: list[Fault] = [
    *(Close(), Close(9), Drop(), Delay(3.0), Garbage(b"\x00\n"), Split(7)),
    Flood(200, b'{"event": "X_UPM_CONVERSIONS", "data": {"cursor": 1, "dropped": 0}}\n'),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Nobody reads what it logs."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


def resident_bytes() -> int:
    """Of this process, without its garbage."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def guest(served: Served, choose: random.Random) -> None:
    """Many small transfers, then a bounce buffer, then a balloon, then quiet, for ever."""
    plugin = served.vm.plugin
    while True:
        for _ in range(25):
            page = choose.randrange(8)
            plugin.convert(1, page * PAGE, PAGE, to_private=False)
            await asyncio.sleep(0.5)
            plugin.convert(1, page * PAGE, PAGE, to_private=True)
        plugin.convert(1, 8 * MIB, 4 * MIB, to_private=choose.random() < 0.5, count=1024)
        for _ in range(12):
            page = choose.randrange(4096, 16384)
            plugin.convert(1, page * PAGE, PAGE, to_private=choose.random() < 0.5)
            await asyncio.sleep(choose.uniform(0, 1))
        await asyncio.sleep(choose.uniform(0, 240))


async def trouble(served: Served, choose: random.Random) -> None:
    """Now and then the VM is gone for a moment, or sends what it should not."""
    while True:
        await asyncio.sleep(choose.uniform(10, 60))
        if choose.random() < 0.3:
            await served.vm.hang_up()
        else:
            served.plan.add("x-upm-read", choose.choice(FAULTS))


def settled(fleet: list[Served]) -> bool:
    """Whether all are served, and no fake is busy with a fault, which is a task."""
    faults = sum("_send_waiting" in repr(task) for task in asyncio.all_tasks())
    return not faults and all(served.attached for served in fleet)


def sample(fleet: list[Served]) -> dict[str, int]:
    """What has to stay flat."""
    return {
        "resident": resident_bytes(),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "tasks": len(asyncio.all_tasks()),
        "attached": sum(served.attached for served in fleet),
    }


async def soak(folder: Path) -> dict[str, list[int]]:
    """A sample a minute, each taken when all VMs are served."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    choose = random.Random(1)  # noqa: S311 - repeatable, not secret
    samples: list[dict[str, int]] = []
    async with contextlib.AsyncExitStack() as stack:
        made: Fleet = await stack.enter_async_context(running_fleet(folder, loop.clock))
        policies = [{"name": "lazy"}, {"name": "batched"}, {"name": "eager", "copies": "none"}]
        fleet = [
            await made.add(f"vm-{i}", budget=BUDGET, lease="20 s", policy=policies[i % 3])
            for i in range(VMS)
        ]
        tasks = [asyncio.create_task(guest(served, choose)) for served in fleet]
        tasks += [asyncio.create_task(trouble(served, choose)) for served in fleet[VMS // 2 :]]
        for _ in range(MINUTES):
            await asyncio.sleep(60)
            await until(lambda: settled(fleet), 0.1)
            made.write_telemetry()
            for served in fleet:
                served.vm.asked.clear()
            samples.append(sample(fleet))
            for served in fleet:
                assert served.vm.plugin.ledger.stale_pages * PAGE <= BUDGET
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for served in fleet[: VMS // 2]:
            assert served.counters["lease-expiries"] == 0
            assert served.vm.connections == 1
        for served in fleet[VMS // 2 :]:
            assert served.vm.connections > MINUTES // 10
    return {key: [one[key] for one in samples[WARM_MINUTES:]] for key in samples[0]}


def test_half_an_hour(tmp_path: Path) -> None:
    """Bounded all the while; healthy VMs lose no lease, troubled ones come back each time."""
    flat = run_in_virtual_time(soak(tmp_path))
    assert max(flat["resident"]) - flat["resident"][0] < GROWTH_MOST
    assert max(flat["files"]) <= flat["files"][0]
    assert max(flat["tasks"]) <= flat["tasks"][0]
