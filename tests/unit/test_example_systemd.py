# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's files, read by systemd itself; nothing is started."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qmp_upm.configfile import load_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "systemd"
PROGRAM = Path(sys.executable).with_name("qmp-upm")
MOST_EXPOSURE = 15
"""Tenths of systemd's scale from 0, safe, to 10; systemd 252 and 254 say 11."""

NOTIFY_RELOAD_SINCE = 253


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """The finished command, stdout and stderr in one."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def systemd_version() -> int:
    """That of the machine that runs the tests."""
    found = re.match(r"systemd (\d+)", run("systemd-analyze", "--version").stdout)
    assert found is not None
    return int(found[1])


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit as installed, but for the program, which is where the tests have it."""
    text = (EXAMPLE / "qmp-upm.service").read_text(encoding="utf-8")
    assert text.count("/opt/qmp-upm/bin/qmp-upm ") == 1
    unit = tmp_path / "qmp-upm.service"
    unit.write_text(text.replace("/opt/qmp-upm/bin/qmp-upm", str(PROGRAM)), encoding="utf-8")
    return unit


def with_drop_in(unit: Path) -> Path:
    """The same beside the drop-in for an old systemd."""
    directory = unit.with_name("qmp-upm.service.d")
    directory.mkdir()
    text = (EXAMPLE / "before-253.conf").read_text(encoding="utf-8")
    (directory / "before-253.conf").write_text(text, encoding="utf-8")
    return unit


def test_unit_is_one_that_systemd_understands(unit: Path) -> None:
    """No complaint; from a systemd that lacks notify-reload, that one and no other."""
    complaints = [r".*:\d+: Failed to parse service type, ignoring: notify-reload"]
    if systemd_version() >= NOTIFY_RELOAD_SINCE:
        complaints = []
    else:
        with_drop_in(unit)
    result = run("systemd-analyze", "verify", "--man=no", unit)
    said = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout
    assert len(said) == len(complaints), result.stdout
    for line, expected in zip(said, complaints, strict=True):
        assert re.fullmatch(expected, line)


def test_a_mistake_would_be_seen(unit: Path) -> None:
    """The check above can fail: systemd names the line of a directive that it does not know."""
    unit.write_text(
        unit.read_text(encoding="utf-8").replace("WatchdogSec", "WatchdogSeconds"), encoding="utf-8"
    )
    assert "WatchdogSeconds" in run("systemd-analyze", "verify", "--man=no", unit).stdout


def test_exposure_is_low(unit: Path) -> None:
    """What systemd thinks of the sandbox."""
    result = run(
        "systemd-analyze",
        "security",
        "--offline=true",
        "--no-pager",
        f"--threshold={MOST_EXPOSURE}",
        unit,
    )
    assert result.returncode == 0, result.stdout
    assert "Overall exposure level" in result.stdout


def test_user_and_directory_of_monitors_are_made(tmp_path: Path) -> None:
    """What the other two files declare is accepted, and names the unit's user and group."""
    for name in ("sysusers", "tmpfiles"):
        directory = tmp_path / "etc" / f"{name}.d"
        directory.mkdir(parents=True)
        text = (EXAMPLE / f"{name}.conf").read_text(encoding="utf-8")
        (directory / "qmp-upm.conf").write_text(text, encoding="utf-8")
    assert run("systemd-sysusers", f"--root={tmp_path}").returncode == 0
    users = (tmp_path / "etc" / "passwd").read_text(encoding="utf-8")
    groups = (tmp_path / "etc" / "group").read_text(encoding="utf-8")
    unit = (EXAMPLE / "qmp-upm.service").read_text(encoding="utf-8").splitlines()
    assert "User=qmp-upm" in unit
    assert "Group=qmp-upm" in unit
    assert "\nqmp-upm:" in f"\n{users}"
    assert "\nqmp-upm:" in f"\n{groups}"
    line = (EXAMPLE / "tmpfiles.conf").read_text(encoding="utf-8").splitlines()[-1].split()
    assert line[:3] == ["d", "/run/libvirt/qemu/upm", "2770"]
    assert line[4] == "qmp-upm"


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_configurations_write_where_the_unit_lets_them(config: Path) -> None:
    """Telemetry and control socket lie in the directories that systemd makes."""
    unit = (EXAMPLE / "qmp-upm.service").read_text(encoding="utf-8").splitlines()
    loaded = load_config(config)
    logs, run = loaded.telemetry.directory, loaded.control.socket.parent
    assert (logs.parent, run.parent) == (Path("/var/log"), Path("/run"))
    assert f"LogsDirectory={logs.name}" in unit
    assert f"RuntimeDirectory={run.name}" in unit


def test_metrics_are_let_through() -> None:
    """The default address is on the loopback, which is all the network that the unit allows."""
    unit = (EXAMPLE / "qmp-upm.service").read_text(encoding="utf-8").splitlines()
    loaded = load_config(ROOT / "configs" / "default.toml")
    assert loaded.metrics.listen.startswith("127.0.0.1:")
    assert {"IPAddressDeny=any", "IPAddressAllow=localhost"} <= set(unit)
