# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory pressure of the host, and of the cgroup in which a VM's QEMU runs.

Sources: proc(5), Documentation/accounting/psi.rst and cgroup-v2.rst of the kernel. What can't be
read is not known: a kernel without PSI, a cgroup of version 1, or a process that has gone is no
error. Only VMs that hold something are looked at, since pressure is a reason to give it back, and
those that were last told of pressure, since they hold nothing for as long as that lasts.

Where the kernel lets us, it says itself when pressure begins (`qmp_upm.trigger`); that it has ended
is read.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qmp_upm.policy import Pressure
from qmp_upm.stats import State
from qmp_upm.trigger import TRIGGER_PERCENT, Trigger
from qmp_upm.vm import Session

STEP_PERCENT = 1.0
"""A policy is asked again when a figure has changed by as much."""


@dataclass(frozen=True)
class PressureFiles:
    """Where they are: ``/proc`` and ``/sys/fs/cgroup``, or what a test has made."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")

    def of_host(self) -> Pressure:
        """The host's part."""
        some, full = _averages(self.proc / "pressure" / "memory")
        return Pressure(host_some_percent=some, host_full_percent=full)

    def of_vm(self, host: Pressure, process: int) -> Pressure:
        """The host's part with that of the process's cgroup."""
        groups = self._groups_of(process)
        if not groups:
            return host
        some, full = _averages(groups[0] / "memory.pressure")
        limits = [limit for group in groups if (limit := _number(group / "memory.max")) is not None]
        return replace(
            host,
            cgroup_some_percent=some,
            cgroup_full_percent=full,
            cgroup_memory_bytes=_number(groups[0] / "memory.current"),
            cgroup_limit_bytes=min(limits, default=None),
        )

    def _groups_of(self, process: int) -> list[Path]:
        """The directories in the unified hierarchy that limit its memory, the nearest first.

        /proc/PID/cgroup names the leaf (``0::/…``). libvirt puts QEMU's threads into threaded
        groups, ``….scope/libvirt/emulator`` and ``vcpuN``, that have the processor's controllers
        only: the memory of all of them is the scope's.
        """
        for line in _read(self.proc / str(process) / "cgroup").splitlines():
            if line.startswith("0::/"):
                leaf = self.cgroup / line.removeprefix("0::/")
                groups = (leaf, *leaf.parents[: len(leaf.parts) - len(self.cgroup.parts)])
                return [group for group in groups if _is_file(group / "memory.max")]
        return []


async def watch_pressure(
    files: PressureFiles, sessions: Callable[[], Iterable[Session]], interval_s: Callable[[], float]
) -> None:
    """Tell each attached VM of a change of its pressure, until cancelled."""
    with Trigger(files.proc / "pressure" / "memory") as trigger:
        while True:
            host = files.of_host()
            if trigger.is_fresh:  # the averages come after
                host = replace(host, host_some_percent=max(host.host_some_percent, TRIGGER_PERCENT))
            for session in list(sessions()):
                _tell(session, host, files)
                await asyncio.sleep(0)  # there may be a thousand
            await trigger.wait(interval_s())


def _tell(session: Session, host: Pressure, files: PressureFiles) -> None:
    told = session.guest.pressure
    if session.state is not State.ATTACHED:
        return
    if _is_calm(told) and not any(session.guest.stats.stale_bytes.values()):
        return
    now = files.of_vm(host, session.peer.process) if session.peer.process > 0 else host
    if _differs(told, now) or (_is_calm(now) and not _is_calm(told)):
        session.feel(now)


def _is_calm(pressure: Pressure) -> bool:
    """Whether nobody waits for memory."""
    return not any(_percents(pressure)[:4])


def _differs(before: Pressure, now: Pressure) -> bool:
    pairs = zip(_percents(before), _percents(now), strict=True)
    return any(abs(a - b) >= STEP_PERCENT for a, b in pairs)


def _percents(pressure: Pressure) -> tuple[float, ...]:
    used, limit = pressure.cgroup_memory_bytes, pressure.cgroup_limit_bytes
    return (
        pressure.host_some_percent,
        pressure.host_full_percent,
        pressure.cgroup_some_percent,
        pressure.cgroup_full_percent,
        100 * used / limit if used and limit else 0.0,
    )


def _averages(file: Path) -> tuple[float, float]:
    """``avg10`` of the lines ``some`` and ``full``, in percent."""
    found = {"some": 0.0, "full": 0.0}
    for line in _read(file).splitlines():
        kind, *fields = line.split()
        for field in fields:
            key, _, value = field.partition("=")
            if kind in found and key == "avg10":
                found[kind] = _percent(value)
    return found["some"], found["full"]


def _percent(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 100.0)
    except ValueError:
        return 0.0


def _number(file: Path) -> int | None:
    """A number of bytes; None for ``max``, and where there is none."""
    text = _read(file).strip()
    return int(text) if text.isascii() and text.isdecimal() else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except (OSError, ValueError):  # ValueError: a name that the file system's encoding has not
        return ""
