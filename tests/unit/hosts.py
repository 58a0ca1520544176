# SPDX-License-Identifier: GPL-2.0-or-later
"""A host of the daemon's over fake VMs, as the tests of whole episodes need it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from qmp_upm.configfile import load_config
from qmp_upm.credentials import ReadCredentials, read_credentials
from qmp_upm.host import Host
from qmp_upm.pressure import PressureFiles

KEEP = 'policy = { name = "eager", copies = "none" }\n'


def write(tmp_path: Path, text: str = "", head: str = "") -> Path:
    """A configuration that looks for VMs in tmp_path/vms, every few milliseconds."""
    (tmp_path / "vms").mkdir(exist_ok=True)
    file = tmp_path / "config.toml"
    file.write_text(
        f'discovery = ["{tmp_path}/vms/*.monitor"]\n{head}\n[telemetry]\n'
        f'directory = "{tmp_path}"\n{text}\n'
    )
    return file


FAST = "[host]\ndiscovery_interval = 0.01\npressure_interval = 0.01\n"


@contextlib.asynccontextmanager
async def hosting(
    file: Path,
    files: PressureFiles | None = None,
    read_credentials: ReadCredentials = read_credentials,
) -> AsyncIterator[Host]:
    """A host at work. What it leaves behind, `tests.conftest` sees."""
    host = Host(load_config(file), files=files, read_credentials=read_credentials)
    host.start()
    task = asyncio.create_task(host.run())
    try:
        yield host
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def states(host: Host) -> dict[str, str]:
    """Names and states."""
    return {view.name: view.state.value for view in host.vms()}
