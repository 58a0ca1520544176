# SPDX-License-Identifier: GPL-2.0-or-later
"""The doctor before a real QEMU and this machine's KVM."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_upm.plugin import plugin_path

PROGRAM = Path(sys.executable).with_name("qmp-upm")
needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm"
)


def doctor(*arguments: str | Path) -> dict[str, dict[str, str]]:
    """Findings by name; the exit code says whether one of them is a failure."""
    result = subprocess.run(
        [PROGRAM, "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    failed = any(check["status"] == "fail" for check in answer["checks"])
    assert (result.returncode, answer["works"]) == (int(failed), not failed)
    return {check["name"]: check for check in answer["checks"]}


@pytest.fixture(params=["plugin", "stock"])
def monitor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The monitor of a QEMU with the plugin, or without."""
    listens = tmp_path / f"{request.param}.monitor"
    command = ["qemu-system-x86_64", "-machine", "none", "-accel", "kvm", "-nodefaults", "-S"]
    command += ["-display", "none", "-qmp", f"unix:{listens},server=on,wait=off"]
    command += ["-pidfile", str(tmp_path / "pid"), "-daemonize"]
    preload = {"LD_PRELOAD": str(plugin_path())} if request.param == "plugin" else {}
    subprocess.run(command, env=os.environ | preload, timeout=20, check=True)
    yield listens
    os.kill(int((tmp_path / "pid").read_text(encoding="ascii")), 15)


@needs_kvm
def test_stock_qemu_passes() -> None:
    """This distribution's QEMU: its symbols, the plugin in it, and under libvirt's filter."""
    found = doctor()
    for name in ("kvm", "kernel", "qemu", "symbols", "plugin", "seccomp"):
        assert found[name]["status"] == "ok", found[name]


@needs_kvm
def test_running_vm(monitor: Path) -> None:
    """With the plugin it is named, without the doctor says what loads it; either can be joined."""
    for _ in range(2):
        found = doctor("--socket", monitor)[f"monitor {monitor.name}"]
        if monitor.stem == "plugin":
            assert found["status"] == "warn"  # it has no guest_memfd
            assert "with plugin" in found["seen"]
        else:
            assert found["status"] == "fail"
            assert f"LD_PRELOAD={plugin_path()}" in found["action"]


@needs_kvm
@pytest.mark.parametrize("monitor", ["stock"], indirect=True)
def test_monitor_that_is_taken(monitor: Path) -> None:
    """Somebody else is on it: said, within the time of one connection."""
    with socket.socket(socket.AF_UNIX) as taken:
        taken.connect(str(monitor))
        assert taken.recv(1)
        found = doctor("--socket", monitor)[f"monitor {monitor.name}"]
    assert found["status"] == "warn"
    assert "does not answer" in found["seen"]
    assert "of its own" in found["action"]


def test_another_qemu_and_another_proc(tmp_path: Path) -> None:
    """What is named on the command line is what is looked at."""
    found = doctor("--qemu", str(shutil.which("true")), "--proc-root", tmp_path)
    assert found["qemu"]["status"] == "fail"
    assert found["kernel"]["status"] == "unknown"
    assert str(tmp_path) in found["pressure"]["seen"]


def test_for_people() -> None:
    """The table ends with the verdict that the exit code gives."""
    result = subprocess.run(
        [PROGRAM, "doctor"], capture_output=True, text=True, timeout=60, check=False
    )
    verdict = {0: "qmp-upm would work here.", 1: "qmp-upm would not work here"}
    assert result.stdout.splitlines()[-1].startswith(verdict[result.returncode])
