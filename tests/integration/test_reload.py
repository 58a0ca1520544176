# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGHUP and SIGTERM to the real daemon, with a VM beside it."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from qmp_upm.client import connect
from qmp_upm.protocol import Copy
from tests.unit.sessions import PAGE, fake_vm, until

PROGRAM = str(Path(sys.executable).with_name("qmp-upm"))


def write(tmp_path: Path, rest: str) -> Path:
    """A configuration for the VM at tmp_path/sock; nothing that other tests could meet."""
    file = tmp_path / "config.toml"
    file.write_text(
        f'[telemetry]\ndirectory = "{tmp_path}"\n[control]\nsocket = "{tmp_path}/control"\n'
        f'[metrics]\nlisten = ""\n[vms.web]\nsocket = "{tmp_path}/sock"\n{rest}'
    )
    return file


@contextlib.asynccontextmanager
async def daemon(file: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The installed daemon."""
    with (file.parent / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            PROGRAM, "run", "--config", str(file), stderr=log
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_hangup_reloads_and_term_leaves(tmp_path: Path) -> None:
    """A new policy takes over what the old one kept; a bad file is said; the end is fail-safe."""
    log = tmp_path / "log"
    file = write(tmp_path, 'policy = { name = "eager", copies = "none" }\n')
    async with fake_vm().listening(tmp_path / "sock") as peer, daemon(file) as process:
        plugin = peer.plugin
        await until(lambda: plugin.ledger.deferring[Copy.SHARED])
        plugin.convert(1, 0, PAGE, to_private=True)

        write(tmp_path, "policy = 7\n")
        process.send_signal(signal.SIGHUP)
        await until(lambda: b"reload-failed" in log.read_bytes())
        assert b"config.toml:9: vms.web.policy" in log.read_bytes()
        assert plugin.ledger.stale(Copy.SHARED) == PAGE

        write(tmp_path, 'policy = { name = "batched", max_delay = "1 ms" }\n')
        process.send_signal(signal.SIGHUP)
        await until(lambda: plugin.ledger.stale(Copy.SHARED) == 0)
        async with connect(tmp_path / "control") as client:
            (vm,) = await client.execute("query-vms")
            assert (vm["policy"], vm["state"]) == ("batched", "attached")
        assert peer.connections == 1

        plugin.convert(1, 0, PAGE, to_private=False)
        process.terminate()
        async with asyncio.timeout(20):
            assert await process.wait() == 0
        assert not any(plugin.ledger.deferring.values())
        await until(lambda: plugin.ledger.stale(Copy.PRIVATE) == 0)
