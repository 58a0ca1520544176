# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon as its operators see it from outside: systemd, and whoever scrapes it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("qmp-upm")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """Plays systemd at tmp_path/notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(20)
        yield made


def write_config(tmp_path: Path, listen: str, more: str = "") -> Path:
    """One VM that is not there."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[telemetry]\ndirectory = "{tmp_path}"\n'
        f'[control]\nsocket = "{tmp_path}/control.sock"\n'
        f'[metrics]\nlisten = "{listen}"\n'
        f'[vms.guest]\nsocket = "{tmp_path}/none"\n{more}',
        encoding="utf-8",
    )
    return config


@pytest.fixture
def daemon(tmp_path: Path, manager: socket.socket) -> Iterator[subprocess.Popen[str]]:
    """Started by that systemd; it has been told nothing yet."""
    process = subprocess.Popen(
        [PROGRAM, "run", "--config", write_config(tmp_path, "127.0.0.1:0")],
        env=dict(os.environ, NOTIFY_SOCKET=manager.getsockname(), WATCHDOG_USEC="600000"),
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def test_a_service_from_start_to_end(manager: socket.socket, daemon: subprocess.Popen[str]) -> None:
    """Ready once it serves, alive while it does, and stopping before it ends with 0."""
    assert manager.recv(4096) == b"READY=1\nSTATUS=0 of 1 VMs attached"
    assert {manager.recv(4096), manager.recv(4096)} == {b"WATCHDOG=1"}
    daemon.send_signal(signal.SIGTERM)
    beats_until(manager, b"STOPPING=1\n")
    assert daemon.wait(20) == 0


def beats_until(manager: socket.socket, start: bytes) -> bytes:
    """The next datagram that begins so, after signs of life at most."""
    while (said := manager.recv(4096)) == b"WATCHDOG=1":
        pass
    assert said.startswith(start), said
    return said


def test_a_reload_is_begun_and_ended(
    tmp_path: Path, manager: socket.socket, daemon: subprocess.Popen[str]
) -> None:
    """Also one that fails: then the old configuration serves on, and a metric says so."""
    assert daemon.stderr is not None
    port = next(json.loads(x)["metrics_port"] for x in daemon.stderr if '"event": "started"' in x)
    beats_until(manager, b"READY=1\n")
    loaded = "qmp_upm_config_last_reload_successful"
    for text, successful in (("[nonsense]\n", 0), ("", 1)):
        write_config(tmp_path, "127.0.0.1:0", text)
        begun_us = time.monotonic_ns() // 1000
        daemon.send_signal(signal.SIGHUP)
        said = beats_until(manager, b"RELOADING=1\nMONOTONIC_USEC=")
        assert begun_us <= int(said.rpartition(b"=")[2]) <= time.monotonic_ns() // 1000
        beats_until(manager, b"READY=1\n")
        deadline = time.monotonic() + 20
        while f"\n{loaded} {successful}.0\n" not in get(port, "/metrics")[2]:
            assert time.monotonic() < deadline  # a page is shared for half a second
            time.sleep(0.05)
    assert daemon.poll() is None


def get(port: int, path: str) -> tuple[int, str, str]:
    """Status, type and text of a page."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=20)) as client:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


def test_pages(daemon: subprocess.Popen[str]) -> None:
    """Alive, ready, and metrics that Prometheus' own tool is content with."""
    assert daemon.stderr is not None
    started = next(json.loads(line) for line in daemon.stderr if '"event": "started"' in line)
    port = started["metrics_port"]
    assert get(port, "/healthz") == (200, "text/plain; charset=utf-8", "ok\n")
    assert get(port, "/readyz") == (200, "text/plain; charset=utf-8", "ok\n")
    assert get(port, "/")[0] == 404
    status, kind, text = get(port, "/metrics")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'qmp_upm_vm_up{domain="guest"} 0.0\n' in text
    assert "\nprocess_resident_memory_bytes " in text
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_taken_port_ends_with_78_and_a_hint(tmp_path: Path) -> None:
    """Before any VM is touched."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = subprocess.run(
            [PROGRAM, "run", "--config", write_config(tmp_path, f"127.0.0.1:{port}")],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert ended.returncode == 78
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "hint: " in ended.stderr
    assert not list(tmp_path.glob("*.jsonl"))
