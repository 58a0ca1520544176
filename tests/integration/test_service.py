# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon as systemd sees it: what it is told from start to end."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def test_a_service_from_start_to_end(tmp_path: Path) -> None:
    """Ready once it serves, alive while it does, and stopping before it ends with 0."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[telemetry]\ndirectory = "{tmp_path}"\n'
        f'[control]\nsocket = "{tmp_path}/control.sock"\n'
        f'[vms.guest]\nsocket = "{tmp_path}/none"\n',
        encoding="utf-8",
    )
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(20)
    daemon = subprocess.Popen(
        [Path(sys.executable).with_name("qmp-upm"), "run", "--config", config],
        env=dict(os.environ, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="600000"),
        stderr=subprocess.DEVNULL,
    )
    try:
        assert manager.recv(4096) == b"READY=1\nSTATUS=0 of 1 VMs attached"
        assert {manager.recv(4096), manager.recv(4096)} == {b"WATCHDOG=1"}
        daemon.send_signal(signal.SIGTERM)
        while (said := manager.recv(4096)) == b"WATCHDOG=1":
            pass
        assert said.startswith(b"STOPPING=1\n")
        assert daemon.wait(20) == 0
    finally:
        daemon.kill()
        daemon.wait()
        manager.close()
