# SPDX-License-Identifier: GPL-2.0-or-later
"""The lines that libvirt's examples give to QEMU, given to QEMU."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from qemu.qmp import QMPClient

from qmp_upm.plugin import plugin_path

EXAMPLE = Path(__file__).parents[2] / "examples" / "libvirt"
NAMESPACE = "{http://libvirt.org/schemas/domain/qemu/1.0}"
MONITOR = "/run/libvirt/qemu/upm/guest.monitor"
PLUGIN = "/usr/lib/x86_64-linux-gnu/qemu/qmp-upm.so"
pytestmark = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm"
)


def start_qemu(fragment: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """What QEMU says when it starts, without a machine, with the fragment but our paths.

    It is a daemon by then: its monitor listens at directory/monitor, directory/pid has its number.
    """
    lines = ET.parse(EXAMPLE / fragment).getroot()  # noqa: S314 - our own file
    arguments = [line.attrib["value"] for line in lines.iter(f"{NAMESPACE}arg")]
    assert sum(MONITOR in argument for argument in arguments) == 1
    variables = [tuple(line.attrib.values()) for line in lines.iter(f"{NAMESPACE}env")]
    assert variables == [("LD_PRELOAD", PLUGIN)]
    command = ["qemu-system-x86_64", "-machine", "none", "-accel", "kvm", "-nodefaults", "-S"]
    command += ["-display", "none", "-daemonize", "-pidfile", str(directory / "pid")]
    command += [argument.replace(MONITOR, str(directory / "monitor")) for argument in arguments]
    return subprocess.run(
        command,
        env=dict(os.environ, LD_PRELOAD=str(plugin_path())),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def has_monitor_objects() -> bool:
    """Whether the QEMU here makes monitors with -object."""
    result = subprocess.run(
        ["qemu-system-x86_64", "-object", "help"], capture_output=True, text=True, check=True
    )
    return "monitor-qmp" in result.stdout


async def plugin_answers(directory: Path) -> bool:
    """Whether it does on the monitor. QEMU is ended."""
    client = QMPClient()
    try:
        async with asyncio.timeout(60):
            await client.connect(str(directory / "monitor"))
            query = await client.execute("x-upm-query", oob=True)
            await client.disconnect()
    finally:
        os.kill(int((directory / "pid").read_text(encoding="ascii")), signal.SIGTERM)
    return bool(query["protocol"])


async def test_monitor_and_plugin(tmp_path: Path) -> None:
    """The fragment makes a monitor on which the plugin answers, and QEMU warns of nothing."""
    started = start_qemu("commandline.xml", tmp_path)
    assert (started.returncode, started.stderr) == (0, "")
    assert await plugin_answers(tmp_path)


async def test_monitor_as_an_object(tmp_path: Path) -> None:
    """The same with -object; a QEMU that has no such object says so, and does not start."""
    started = start_qemu("commandline-object.xml", tmp_path)
    if has_monitor_objects():
        assert (started.returncode, started.stderr) == (0, "")
        assert await plugin_answers(tmp_path)
    else:
        assert "monitor-qmp" in started.stderr
        assert started.returncode == 1
