# SPDX-License-Identifier: GPL-2.0-or-later
"""How the program ends: 0 done, 1 failed, 2 usage, 78 configuration; and that it does end."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_upm.cli import EXIT_CONFIG
from qmp_upm.plugin import plugin_path

PROGRAM = Path(sys.executable).with_name("qmp-upm")
UNIT = Path(__file__).parents[2] / "examples" / "systemd" / "qmp-upm.service"
GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""},'
    b' "capabilities": ["oob"]}}\r\n'
)


def directive(name: str) -> str:
    """What the unit says for this key."""
    found = re.search(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


STOP_SECONDS = float(directive("TimeoutStopSec").removesuffix("s"))
"""After which systemd would kill the daemon."""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The finished program."""
    return subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def write_config(tmp_path: Path, monitor: Path, more: str = "") -> Path:
    """One VM, and nothing outside of tmp_path."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[telemetry]\ndirectory = "{tmp_path}"\n'
        f'[control]\nsocket = "{tmp_path}/control.sock"\n'
        '[metrics]\nlisten = ""\n'
        f'[vms.guest]\nsocket = "{monitor}"\n{more}',
        encoding="utf-8",
    )
    return config


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["plugin", "path"]], ids=" ".join)
def test_done(arguments: list[str]) -> None:
    """What it was asked for is on stdout, and nothing on stderr."""
    result = run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout


def test_failed() -> None:
    """A host that would not do, for example."""
    assert run("doctor", "--qemu", "/bin/true").returncode == 1


USAGE = [["nonsense"], ["run"], ["run", "--config"], ["run", "--config", "x", "--log-level", "all"]]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_usage(arguments: list[str]) -> None:
    """A command line that means nothing starts nothing, and says so on stderr."""
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert " Error " in result.stderr


BAD_CONFIG = {
    "not TOML": "= =",
    "unknown key": "budgets = 1",
    "unknown policy": 'policy = { name = "hoard" }',
    "unknown parameter": 'policy = { name = "lazy", max_ages = "1 s" }',
}


@pytest.mark.parametrize("kind", BAD_CONFIG)
def test_configuration(tmp_path: Path, kind: str) -> None:
    """A file that can't be used is named with a hint; no VM is touched."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.bind(str(tmp_path / "monitor"))
        monitor.listen()
        monitor.setblocking(False)
        config = write_config(tmp_path, tmp_path / "monitor", BAD_CONFIG[kind])
        result = run("run", "--config", config)
        with pytest.raises(BlockingIOError):
            monitor.accept()
    assert (result.returncode, result.stdout) == (EXIT_CONFIG, "")
    assert str(config) in result.stderr
    assert "\nhint: " in result.stderr


def test_configuration_that_is_not_there(tmp_path: Path) -> None:
    """The unit's own command line, without its file: an end that systemd does not try again."""
    _program, *arguments, config = directive("ExecStart").split()
    result = run(*arguments, str(tmp_path / Path(config).name))
    assert (result.returncode, result.stdout) == (EXIT_CONFIG, "")
    assert int(directive("RestartPreventExitStatus")) == EXIT_CONFIG


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[socket.socket]:
    """Listens where a VM's monitor is expected, and does nothing of itself."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "monitor"))
        made.listen()
        made.settimeout(60)
        yield made


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Started on that monitor."""
    process = subprocess.Popen(
        [PROGRAM, "run", "--config", write_config(tmp_path, tmp_path / "monitor")],
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def wait_for_log(daemon: subprocess.Popen[str], event: str) -> None:
    """Read the log up to this event."""
    assert daemon.stderr is not None
    assert any(f'"event": "{event}"' in line for line in daemon.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_told_to_end(daemon: subprocess.Popen[str], number: signal.Signals) -> None:
    """Either signal, sent twice by somebody in a hurry: 0."""
    wait_for_log(daemon, "started")
    daemon.send_signal(number)
    daemon.send_signal(number)
    assert daemon.wait(STOP_SECONDS) == 0


def test_told_to_end_while_a_monitor_never_greets(
    monitor: socket.socket, daemon: subprocess.Popen[str]
) -> None:
    """The connection stands, and nothing comes: 0, before systemd would kill it."""
    with monitor.accept()[0]:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(STOP_SECONDS) == 0


def test_told_to_end_while_a_monitor_says_no_more(
    monitor: socket.socket, daemon: subprocess.Popen[str]
) -> None:
    """QEMU has greeted, and hangs in the first command: 0, before systemd would kill it."""
    with monitor.accept()[0] as qemu:
        qemu.settimeout(60)
        qemu.sendall(GREETING)
        assert b"qmp_capabilities" in qemu.recv(4096)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(STOP_SECONDS) == 0


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm")
def test_told_to_end_while_an_attached_qemu_hangs(
    tmp_path: Path, daemon: subprocess.Popen[str]
) -> None:
    """It can't say good-bye, gives up, and says that the plugin will do it alone."""
    command = ["qemu-system-x86_64", "-machine", "none", "-accel", "kvm", "-nodefaults", "-S"]
    command += ["-display", "none", "-qmp", f"unix:{tmp_path}/monitor,server=on,wait=off"]
    qemu = subprocess.Popen(
        command, env=os.environ | {"LD_PRELOAD": str(plugin_path())}, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_log(daemon, "attached")
        qemu.send_signal(signal.SIGSTOP)
        daemon.send_signal(signal.SIGTERM)
        _, said = daemon.communicate(timeout=STOP_SECONDS)
        assert daemon.returncode == 0
        assert '"not-left-cleanly"' in said
        assert "lease" in said
    finally:
        qemu.kill()
        qemu.wait()
