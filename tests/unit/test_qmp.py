# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection to a QEMU that does not keep its side of it."""

import asyncio
import os
from pathlib import Path

import pytest

from qmp_upm import qmp
from qmp_upm.errors import LinkError, SilentError
from qmp_upm.qmp import Monitor
from qmp_upm.testing.peer import encode
from tests.unit.sessions import fake_vm

GREETING = {"QMP": {"version": {"qemu": {}}, "capabilities": ["oob"]}}


def open_files() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only how many


async def test_peer_that_takes_nothing_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A QEMU that was stopped: what it does not read does not keep the connection open."""
    monkeypatch.setattr(qmp, "EXECUTE_SECONDS", 0.05)
    monkeypatch.setattr(qmp, "CLOSE_SECONDS", 0.05)
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(GREETING))
        await reader.readuntil(b"}}")
        writer.write(encode({"return": {}, "id": "__qmp#00000"}))
        writer.transport.pause_reading()  # type: ignore[attr-defined] # a transport that reads
        await over.wait()
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "sock", limit=1024)
    before = open_files()
    monitor = Monitor(str(tmp_path / "sock"))
    await monitor.connect()
    with pytest.raises(SilentError):
        await monitor.execute("x-upm-discard", {"ranges": "x" * (8 << 20)})
    async with asyncio.timeout(20):
        await monitor.close()
        over.set()
        while open_files() > before:  # noqa: ASYNC110 - the peer's end closes when it likes
            await asyncio.sleep(0.002)
    server.close()


async def test_interrupted_connect_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody greets, and the session is cancelled meanwhile: no file and no task is left."""
    monkeypatch.setattr(qmp, "CLOSE_SECONDS", 0.05)
    async with fake_vm().listening(tmp_path / "sock"):
        holder = Monitor(str(tmp_path / "sock"))
        await holder.connect()
        before = open_files()
        monitor = Monitor(str(tmp_path / "sock"))
        connecting = asyncio.create_task(monitor.connect())
        async with asyncio.timeout(20):
            while open_files() < before + 2:  # noqa: ASYNC110 - both ends are open then
                await asyncio.sleep(0.002)
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            await monitor.close()
            await holder.close()
    async with asyncio.timeout(20):
        while open_files() > before - 2:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_nobody_listens(tmp_path: Path) -> None:
    """Neither is there a socket, nor would one of this name be possible."""
    for path in (tmp_path / "none", tmp_path / ("x" * 200)):
        monitor = Monitor(str(path))
        with pytest.raises(LinkError, match="cannot connect"):
            await monitor.connect()
        await monitor.close()
