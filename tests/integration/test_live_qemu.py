# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin and the daemon against a stock QEMU that runs no guest."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import ConnectError, ExecuteError, QMPClient

from qmp_upm.plugin import plugin_path

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64"),
]
needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm"
)


def start_qemu(socket: Path, accel: str, *, plugin: bool) -> subprocess.Popen[str]:
    """A QEMU without a machine, waiting on a monitor."""
    command = [
        str(QEMU),
        "-machine",
        "none",
        "-accel",
        accel,
        "-nodefaults",
        "-display",
        "none",
        "-S",
        "-qmp",
        f"unix:{socket},server=on,wait=off",
    ]
    env = dict(os.environ, LD_PRELOAD=str(plugin_path())) if plugin else None
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def with_plugin(tmp_path: Path) -> Iterator[Path]:
    """The monitor of a QEMU with KVM and the plugin."""
    socket = tmp_path / "qemu.sock"
    process = start_qemu(socket, "kvm", plugin=True)
    yield socket
    process.terminate()
    _, errors = process.communicate(timeout=10)
    assert "qmp-upm" not in errors


async def connect(socket: Path) -> QMPClient:
    """A client, once QEMU listens."""
    client = QMPClient()
    async with asyncio.timeout(20):
        while True:
            try:
                await client.connect(str(socket))
            except ConnectError:  # it has not made it, or does not listen on it yet
                await asyncio.sleep(0.01)
            else:
                return client


@needs_kvm
async def test_commands_are_registered(with_plugin: Path) -> None:
    """A stock QEMU serves the plugin's commands, out of band too, and reports no region."""
    client = await connect(with_plugin)
    names = {line["name"] for line in await client.execute("query-commands")}
    assert {"x-upm-query", "x-upm-configure", "x-upm-read", "x-upm-stale", "x-upm-discard"} <= names
    query = await client.execute("x-upm-query", oob=True)
    assert (query["protocol"], query["regions"], query["conversion"]) == (1, [], "none")
    await client.disconnect()


BAD = [
    ("x-upm-query", {"x": 1}),
    ("x-upm-configure", {"privat": "defer"}),
    ("x-upm-configure", {"private": "lazy"}),
    ("x-upm-configure", {"budget": -1}),
    ("x-upm-configure", {"budget": 1e30}),
    ("x-upm-configure", {"budget": 1 << 63}),
    ("x-upm-configure", {"private": "defer", "lease-ms": "5"}),
    ("x-upm-read", {"cursor": 0}),
    ("x-upm-read", {"cursor": 1, "max": 1}),
    ("x-upm-read", {"cursor": 0, "max": 1 << 40}),
    ("x-upm-stale", {"copy": "private", "region": 1, "cursor": 0, "max": 1}),
    ("x-upm-discard", {"id": 1, "copy": "both"}),
    ("x-upm-discard", {"id": 1, "copy": "both", "all": False}),
    ("x-upm-discard", {"id": 1, "copy": "both", "ranges": []}),
    ("x-upm-discard", {"id": 1, "copy": "both", "ranges": [[1, 0, 4096]]}),
    ("x-upm-discard", {"id": 1, "copy": "both", "ranges": [[1, 1, 4096]]}),
    ("x-upm-discard", {"id": 1, "copy": "both", "ranges": [[1, 0, 4096, 0]]}),
    (
        "x-upm-discard",
        {"id": 1, "copy": "both", "ranges": {"a": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}},
    ),
]


@needs_kvm
async def test_bad_arguments_change_nothing(with_plugin: Path) -> None:
    """Each malformed command is an error with a reason; QEMU is up and nothing has changed."""
    client = await connect(with_plugin)
    before = await client.execute("x-upm-query")
    for command, arguments in BAD:
        with pytest.raises(ExecuteError) as caught:
            await client.execute(command, arguments)
        assert str(caught.value)
    after = await client.execute("x-upm-query")
    for key in ("modes", "budget", "lease", "stale", "records"):
        assert after[key] == before[key]
    await client.disconnect()


@needs_kvm
async def test_lease_runs_out(with_plugin: Path) -> None:
    """Without a word from the daemon the plugin goes back to eager, and says so."""
    client = await connect(with_plugin)
    with client.listener("X_UPM_LEASE_EXPIRED") as listener:
        await client.execute("x-upm-configure", {"shared": "defer", "lease-ms": 50})
        async with asyncio.timeout(20):
            await listener.get()
    query = await client.execute("x-upm-query")
    assert query["modes"] == {"private": "eager", "shared": "eager"}
    assert query["lease"]["expired"]
    await client.disconnect()


def start_daemon(tmp_path: Path, socket: Path) -> subprocess.Popen[str]:
    """The installed daemon, with one VM."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[telemetry]\ndirectory = "{tmp_path}"\n'
        f'[control]\nsocket = "{tmp_path}/control.sock"\n'
        f'[metrics]\nlisten = ""\n'
        f'[vms.guest]\nsocket = "{socket}"\n',
        encoding="utf-8",
    )
    program = Path(sys.executable).with_name("qmp-upm")
    return subprocess.Popen(
        [str(program), "run", "--config", str(config)], stderr=subprocess.PIPE, text=True
    )


def wait_for_log(daemon: subprocess.Popen[str], event: str) -> str:
    """The first log line with this event."""
    assert daemon.stderr is not None
    for line in daemon.stderr:
        if f'"event": "{event}"' in line:
            return line
    raise AssertionError(f"the daemon ended without {event!r}")


@needs_kvm
async def test_daemon_attaches_and_leaves_fail_safe(with_plugin: Path, tmp_path: Path) -> None:
    """It configures the plugin; SIGTERM leaves both modes eager, and exit code 0."""
    client = await connect(with_plugin)
    await client.disconnect()
    daemon = start_daemon(tmp_path, with_plugin)
    await asyncio.to_thread(wait_for_log, daemon, "attached")
    daemon.send_signal(signal.SIGTERM)
    await asyncio.to_thread(daemon.communicate, None, 10)
    assert daemon.returncode == 0
    client = await connect(with_plugin)
    query = await client.execute("x-upm-query")
    assert query["modes"] == {"private": "eager", "shared": "eager"}
    assert query["budget"] == 256 << 20
    await client.disconnect()
    assert '"detached"' in (tmp_path / "guest.jsonl").read_text(encoding="utf-8")


def test_daemon_refuses_qemu_without_plugin(tmp_path: Path) -> None:
    """A QEMU without the plugin is refused with the line that loads it; the daemon stays up."""
    socket = tmp_path / "qemu.sock"
    qemu = start_qemu(socket, "tcg", plugin=False)
    daemon = start_daemon(tmp_path, socket)
    try:
        line = wait_for_log(daemon, "refused")
        assert "LD_PRELOAD=" in line
        assert daemon.poll() is None
    finally:
        daemon.terminate()
        daemon.communicate(timeout=10)
        qemu.terminate()
        qemu.communicate(timeout=10)
    assert daemon.returncode == 0


def test_plugin_stays_out_of_other_programs() -> None:
    """In a program that is no QEMU the plugin does nothing, and stays for what it starts."""
    result = subprocess.run(
        ["sh", "-c", "echo $LD_PRELOAD"],
        check=True,
        capture_output=True,
        text=True,
        env=dict(os.environ, LD_PRELOAD=str(plugin_path())),
    )
    assert (result.stdout.strip(), result.stderr) == (str(plugin_path()), "")


@needs_kvm
def test_plugin_says_why_it_stays_out() -> None:
    """What opens KVM and lacks QEMU's functions, as a QEMU before 9.1 does, runs as without it."""
    program = "import fcntl; print(fcntl.ioctl(open('/dev/kvm'), 0xAE00))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env=dict(os.environ, LD_PRELOAD=str(plugin_path())),
    )
    assert result.stdout.strip() == "12"
    assert "qmp-upm: not in use: this program does not export" in result.stderr
    assert "It takes QEMU 9.1 or newer" in result.stderr
