# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM that waits long to be started, with copies of its last boot that are to be discarded."""

import asyncio
from pathlib import Path

from qmp_upm.asks import Flush
from qmp_upm.protocol import Copy
from qmp_upm.stats import State
from qmp_upm.testing import FakePlugin, FakeVm
from tests.unit.sessions import MIB, PAGE, running, until
from tests.unit.virtualtime import VirtualLoop, run_in_virtual_time

KEEP = {"name": "eager", "copies": "none"}


async def wait_for_a_launch(folder: Path) -> None:
    """Five minutes pass before the processor of the VM runs."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    plugin = FakePlugin({"ram": 64 * MIB}, clock_ns=loop.monotonic_ns)
    async with (
        FakeVm(plugin).listening(folder / "sock") as peer,
        running(folder, loop.clock, policy=KEEP, lease="30 s") as run,
    ):
        await until(lambda: run.session.state is State.ATTACHED)
        plugin.convert(1, 0, PAGE, to_private=True)
        await until(lambda: run.session.guest.stats.stale_bytes[Copy.SHARED] == PAGE)
        plugin.ledger.launching = True
        given = run.session.ask(Flush(None))
        await asyncio.sleep(300)
        assert (run.session.state, peer.connections) == (State.ATTACHED, 1)
        assert not given.done()
        plugin.ledger.launching = False
        plugin.worker.wake()
        assert await given == PAGE


def test_a_launch_may_take_as_long_as_it_likes(tmp_path: Path) -> None:
    """Its session is not broken off meanwhile, and the discard is made when it is over."""
    run_in_virtual_time(wait_for_a_launch(tmp_path))
