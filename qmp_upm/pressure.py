# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory pressure of the host, and of the cgroup in which a VM's QEMU runs.

Sources: proc(5), Documentation/accounting/psi.rst and cgroup-v2.rst of the kernel. What can't be
read is not known: a kernel without PSI, a cgroup of version 1, or a process that has gone is no
error. Only VMs that hold something are looked at: pressure is a reason to give it back.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qmp_upm.policy import Pressure
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
        group = self._group_of(process)
        if group is None:
            return host
        some, full = _averages(group / "memory.pressure")
        return replace(
            host,
            cgroup_some_percent=some,
            cgroup_full_percent=full,
            cgroup_memory_bytes=_number(group / "memory.current"),
            cgroup_limit_bytes=_number(group / "memory.max"),
        )

    def _group_of(self, process: int) -> Path | None:
        """Its directory in the unified hierarchy: the line ``0::/…`` of /proc/PID/cgroup."""
        for line in _read(self.proc / str(process) / "cgroup").splitlines():
            if line.startswith("0::/"):
                return self.cgroup / line.removeprefix("0::/")
        return None


async def watch_pressure(
    files: PressureFiles, sessions: Callable[[], Iterable[Session]], interval_s: Callable[[], float]
) -> None:
    """Tell each VM that holds something of its pressure, until cancelled."""
    while True:
        host = files.of_host()
        for session in sessions():
            if any(session.guest.stats.stale_bytes.values()):
                now = files.of_vm(host, session.peer.process) if session.peer.process > 0 else host
                if _differs(session.guest.pressure, now):
                    session.feel(now)
        await asyncio.sleep(interval_s())


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


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
