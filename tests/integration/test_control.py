# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket of the real daemon, over a live QEMU whose guest converts."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.integration.guest import MEMFD, MIB, PAGE, Guest, has_guest_memfd

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-system-x86_64") and has_guest_memfd()),
    reason="needs QEMU, and /dev/kvm with guest_memfd for any VM (Linux 6.18)",
)

PROGRAM = Path(sys.executable).with_name("qmp-upm")
BASE = 64 * MIB


class Daemon:
    """A daemon with one VM, and its command line."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "control.sock"
        config = folder / "config.toml"
        config.write_text(
            f'[telemetry]\ndirectory = "{folder}"\n'
            f'[control]\nsocket = "{self.socket}"\n'
            '[metrics]\nlisten = ""\n'
            '[defaults]\nbudget = "64 MiB"\npolicy = {name = "eager", copies = "none"}\n'
            f'[vms.guest]\nsocket = "{folder}/second"\n',
            encoding="utf-8",
        )
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [PROGRAM, "run", "--config", config], stderr=self.log, start_new_session=True
        )
        self.until(self.socket.exists)

    def until(self, condition: Callable[[], Any]) -> Any:
        """What this returns, once it is true."""
        end = time.monotonic() + 20
        while not (found := condition()):
            assert self.process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        return found

    def run(self, *arguments: str) -> str:
        """What a command prints."""
        return subprocess.run(
            [PROGRAM, *arguments],
            env=dict(os.environ, QMP_UPM_SOCKET=str(self.socket)),
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def vm(self) -> dict[str, Any]:
        """The VM as `show` prints it."""
        view: dict[str, Any] = json.loads(self.run("show", "guest", "--json"))
        return view

    def close(self) -> None:
        """End it as systemd would; it leaves no socket."""
        self.process.terminate()
        assert self.process.wait(20) == 0
        self.log.close()
        assert not self.socket.exists()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    """A QEMU whose guest's memory converts when told; its monitor works on an event loop."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    guest = Guest(tmp_path, *MEMFD)
    yield guest
    guest.close()
    loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture
def daemon(guest: Guest, tmp_path: Path) -> Iterator[Daemon]:
    """The daemon, attached to it."""
    assert guest.stale() == (0, 0)
    daemon = Daemon(tmp_path)
    daemon.until(lambda: daemon.vm()["state"] == "attached")
    yield daemon
    daemon.close()


def test_what_the_guest_does_is_shown(guest: Guest, daemon: Daemon) -> None:
    """Conversions and stale bytes are the plugin's own, in status, show and top."""
    for page in range(8):
        guest.convert(BASE + page * PAGE, PAGE, private=False)
        guest.convert(BASE + page * PAGE, PAGE, private=True)
    stale = dict(zip(("private", "shared"), guest.stale(), strict=True))
    vm = daemon.until(lambda: (v := daemon.vm())["stats"]["conversions"]["private"] >= 8 and v)
    assert vm["stats"]["conversions"] == {"private": 8, "shared": 8}
    assert vm["stats"]["followed_conversions"] == 16
    assert vm["stale_bytes"] == stale
    assert vm["qemu_version"]
    assert vm["budget_bytes"] == 64 * MIB
    [row] = json.loads(daemon.run("top", "--once", "--interval", "0.1", "--json"))
    assert (row["private_bytes"], row["shared_bytes"]) == (stale["private"], stale["shared"])
    assert "guest" in daemon.run("status")


def test_changes_reach_the_plugin(guest: Guest, daemon: Daemon) -> None:
    """Budget, policy and flush are done in QEMU by the time that the command returns."""
    daemon.run("set-budget", "guest", "1 MiB")
    assert guest.cmd("x-upm-query")["budget"] == 1 * MIB
    daemon.run("set-budget", "guest", "default")
    assert guest.cmd("x-upm-query")["budget"] == 64 * MIB
    guest.convert(BASE, 16 * PAGE, private=False)
    guest.convert(BASE, 16 * PAGE, private=True)
    assert sum(guest.stale()) > 0
    given = json.loads(daemon.run("flush", "guest", "--json"))["bytes"]
    assert given > 0
    assert guest.stale() == (0, 0)
    daemon.run("set-policy", "guest", "eager", "copies=private")
    assert guest.cmd("x-upm-query")["modes"] == {"private": "eager", "shared": "defer"}
    vm = daemon.vm()
    assert (vm["policy"], vm["parameters"]) == ("eager", {"copies": "private"})
    sources = {setting["key"]: setting["source"] for setting in vm["settings"]}
    assert "set-policy" in sources["policy"]


def test_events_follow_changes(guest: Guest, daemon: Daemon) -> None:
    """A client hears of what another one changed, and of the VM's end."""
    client = QEMUMonitorProtocol(str(daemon.socket))
    client.connect(negotiate=True)
    try:
        daemon.run("set-policy", "guest", "lazy", "max_age=1 min")
        daemon.run("set-budget", "guest", "2 MiB")
        seen = [client.pull_event(wait=20.0) for _ in range(2)]
        assert [event["event"] for event in seen if event] == ["POLICY_CHANGED", "BUDGET_CHANGED"]
        assert all(event["data"]["vm"] == "guest" for event in seen if event)
        guest.close()
        while (event := client.pull_event(wait=20.0)) and event["event"] != "VM_STATE":
            pass
        assert event is not None
        assert event["data"]["vm"] == "guest"
    finally:
        client.close()


def test_reload(guest: Guest, daemon: Daemon, tmp_path: Path) -> None:
    """A good file is taken; a bad one changes nothing, and the error says what is wrong."""
    config = tmp_path / "config.toml"
    good = config.read_text(encoding="utf-8").replace("64 MiB", "32 MiB")
    config.write_text(good, encoding="utf-8")
    assert daemon.run("reload") == "reloaded\n"
    daemon.until(lambda: guest.cmd("x-upm-query")["budget"] == 32 * MIB)
    config.write_text(good.replace("budget", "bugdet"), encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        daemon.run("reload")
    assert caught.value.returncode == 1
    assert "bugdet" in caught.value.stderr
    assert "hint: " in caught.value.stderr
    assert daemon.vm()["budget_bytes"] == 32 * MIB


def test_a_second_daemon_stays_out(daemon: Daemon, tmp_path: Path) -> None:
    """It ends with exit code 1 and a hint before it touches a VM; a killed one is succeeded."""
    command = [PROGRAM, "run", "--config", tmp_path / "config.toml"]
    second = subprocess.run(command, check=False, capture_output=True, text=True)
    assert second.returncode == 1
    assert "another daemon serves" in second.stderr
    assert daemon.vm()["state"] == "attached"
    daemon.process.kill()
    daemon.process.wait()
    assert daemon.socket.exists()
    daemon.process = subprocess.Popen(command, stderr=daemon.log)
    daemon.until(
        lambda: (
            subprocess.run(
                [PROGRAM, "status", "--socket", daemon.socket], check=False, capture_output=True
            ).returncode
            == 0
        )
    )
