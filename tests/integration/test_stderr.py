# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon whose stderr is closed, on a full disk, or not read serves its VMs all the same.

Real: the daemon as a process, and its stderr. Simulated: QEMU with the plugin.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmp_upm.client import connect
from qmp_upm.errors import ControlError
from qmp_upm.testing import FakePlugin, FakeVm

WAIT_SECONDS = 30
PIPE_BYTES = 4096

CONFIG = """
discovery = ["{folder}/vms/*.monitor"]
[telemetry]
directory = "{folder}/telemetry"
[metrics]
listen = ""
[control]
socket = "{folder}/control.sock"
"""


@contextlib.contextmanager
def stream(kind: str) -> Iterator[int]:
    """What becomes the daemon's stderr."""
    if kind == "full":
        file = os.open("/dev/full", os.O_WRONLY)
        yield file
        os.close(file)
        return
    reading, writing = os.pipe()
    if kind == "closed":
        os.close(reading)
    else:
        os.set_blocking(writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * PIPE_BYTES)
        os.set_blocking(writing, True)
    yield writing
    os.close(writing)
    if kind != "closed":
        os.close(reading)


async def states(socket: Path) -> dict[str, str]:
    """Of all VMs; none while nobody answers."""
    try:
        async with connect(socket) as client:
            vms: list[dict[str, Any]] = await client.execute("query-vms")
    except ControlError:
        return {}
    return {vm["name"]: vm["state"] for vm in vms}


def vm(name: str) -> FakeVm:
    """One with 64 MiB."""
    return FakeVm(FakePlugin({"ram": 64 << 20}), name=name)


@pytest.mark.parametrize("kind", ["closed", "full", "blocked"])
async def test_nobody_reads_what_the_daemon_logs(tmp_path: Path, kind: str) -> None:
    """A VM restarts and another one comes: all are served, and the daemon ends as it is told."""
    vms, socket = tmp_path / "vms", tmp_path / "control.sock"
    vms.mkdir()
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(folder=tmp_path))

    async def until(expected: dict[str, str]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while await states(socket) != expected:  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.02)

    program = str(Path(sys.executable).with_name("qmp-upm"))
    with stream(kind) as stderr:
        daemon = await asyncio.create_subprocess_exec(
            program, "run", "--config", str(config), stderr=stderr
        )
        try:
            async with vm("one").listening(vms / "one.monitor"):
                await until({"one": "attached"})
            async with (
                vm("one").listening(vms / "one.monitor"),
                vm("two").listening(vms / "two.monitor"),
            ):
                await until({"one": "attached", "two": "attached"})
                daemon.send_signal(signal.SIGTERM)
                async with asyncio.timeout(WAIT_SECONDS):
                    assert await daemon.wait() == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                daemon.kill()
            await daemon.wait()
