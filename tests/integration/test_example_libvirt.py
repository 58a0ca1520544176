# SPDX-License-Identifier: GPL-2.0-or-later
"""The lines that libvirt's examples give to QEMU, given to QEMU."""

import asyncio
import os
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


def start_qemu(fragment: str, socket: Path) -> subprocess.Popen[str]:
    """A QEMU without a machine, with the fragment's arguments and variables, but our paths."""
    lines = ET.parse(EXAMPLE / fragment).getroot()  # noqa: S314 - our own file
    arguments = [line.attrib["value"] for line in lines.iter(f"{NAMESPACE}arg")]
    assert sum(MONITOR in argument for argument in arguments) == 1
    variables = [tuple(line.attrib.values()) for line in lines.iter(f"{NAMESPACE}env")]
    assert variables == [("LD_PRELOAD", PLUGIN)]
    return subprocess.Popen(
        ["qemu-system-x86_64", "-machine", "none", "-accel", "kvm", "-nodefaults"]
        + ["-display", "none", "-S"]
        + [argument.replace(MONITOR, str(socket)) for argument in arguments],
        env=dict(os.environ, LD_PRELOAD=str(plugin_path())),
        stderr=subprocess.PIPE,
        text=True,
    )


def has_monitor_objects() -> bool:
    """Whether the QEMU here makes monitors with -object."""
    result = subprocess.run(
        ["qemu-system-x86_64", "-object", "help"], capture_output=True, text=True, check=True
    )
    return "monitor-qmp" in result.stdout


async def answers(socket: Path) -> bool:
    """Whether the plugin answers on this monitor, once QEMU listens there."""
    client = QMPClient()
    async with asyncio.timeout(20):
        while not socket.exists():  # noqa: ASYNC110, ASYNC240 - QEMU tells nobody when it listens
            await asyncio.sleep(0.01)
        await client.connect(str(socket))
        query = await client.execute("x-upm-query", oob=True)
        await client.disconnect()
    return bool(query["protocol"])


async def ended(qemu: subprocess.Popen[str]) -> str:
    """What QEMU has said, once it is told to end."""
    qemu.terminate()
    _, errors = await asyncio.to_thread(qemu.communicate, None, 20)
    return errors


async def test_monitor_and_plugin(tmp_path: Path) -> None:
    """The fragment makes a monitor on which the plugin answers, and QEMU warns of nothing."""
    qemu = start_qemu("commandline.xml", tmp_path / "monitor")
    try:
        assert await answers(tmp_path / "monitor")
    finally:
        said = await ended(qemu)
    assert "warning" not in said
    assert "qmp-upm" not in said


async def test_monitor_as_an_object(tmp_path: Path) -> None:
    """The same with -object; a QEMU that has no such object says so, and does not start."""
    qemu = start_qemu("commandline-object.xml", tmp_path / "monitor")
    if has_monitor_objects():
        try:
            assert await answers(tmp_path / "monitor")
        finally:
            said = await ended(qemu)
        assert "warning" not in said
    else:
        _, said = await asyncio.to_thread(qemu.communicate, None, 20)
        assert "monitor-qmp" in said
        assert qemu.returncode == 1
