# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor of a running VM: whether the daemon would get in, and find the plugin there."""

import os
import stat
from pathlib import Path

from qmp_upm.doctor.check import Check, Status
from qmp_upm.errors import PeerError, TakenError
from qmp_upm.exits import PluginExits
from qmp_upm.plugin import plugin_env
from qmp_upm.protocol import COMMANDS, PROTOCOL, Query
from qmp_upm.qmp import Monitor
from qmp_upm.remarks import remarks


async def check_monitor(socket: Path) -> Check:
    """One finding, named after the socket. Holds the monitor for a moment, if nobody else does."""
    name = f"monitor {socket.name}"
    return _shut(name, socket) or await _talk(name, socket)


def _shut(name: str, socket: Path) -> Check | None:
    """Why there is no getting in, as far as the file system can tell."""
    try:
        mode = socket.stat().st_mode
    except OSError as error:
        return Check(
            name,
            Status.FAIL,
            f"{socket}: {error.strerror}",
            "does the VM run, with -qmp unix:PATH,server=on,wait=off?",
        )
    if not stat.S_ISSOCK(mode):
        return Check(name, Status.FAIL, f"{socket} is no socket", "name the monitor's own path")
    if not os.access(socket, os.W_OK):
        return Check(
            name,
            Status.FAIL,
            f"{socket} has mode {stat.S_IMODE(mode):o}: not for this user",
            "run as the daemon's user; QEMU needs umask 002 and the daemon's group on the "
            "directory, see examples/systemd",
        )
    return None


async def _talk(name: str, socket: Path) -> Check:
    monitor = Monitor(str(socket))
    try:
        await monitor.connect()
        if COMMANDS - await monitor.command_names():
            return Check(
                name,
                Status.FAIL,
                f"QEMU {monitor.qemu_version} runs without the plugin",
                f"start it with {plugin_env()}",
            )
        query = await PluginExits(monitor).query()
    except TakenError as error:
        return Check(
            name,
            Status.WARN,
            error.message,
            "if qmp-upm itself is on it, all is well, and 'qmp-upm status' says so; otherwise give "
            "it a monitor of its own",
        )
    except PeerError as error:
        return Check(name, Status.FAIL, error.message, error.hint)
    finally:
        await monitor.close()
    return _judge(name, monitor.qemu_version, query)


def _judge(name: str, qemu: str, query: Query) -> Check:
    if query.protocol != PROTOCOL:
        return Check(
            name,
            Status.FAIL,
            f"its plugin {query.version} speaks protocol {query.protocol}, this release {PROTOCOL}",
            "restart the VM with the plugin of this release",
        )
    seen = (
        f"QEMU {qemu} with plugin {query.version}: a {query.vm_kind} VM, "
        f"{len(query.regions)} regions, conversions {query.conversion}"
    )
    idle = {
        "in-place": "there is one copy of each page: no discard can be deferred",
        "none": "it has no guest_memfd: the daemon has nothing to do for it",
    }.get(query.conversion)
    for remark in remarks(query.regions)[:1]:
        return Check(name, Status.WARN, f"{seen}; {remark.seen}", remark.hint)
    return Check(name, Status.WARN if idle else Status.OK, seen, idle or "")
