# SPDX-License-Identifier: GPL-2.0-or-later
"""What a check finds, and where checks look."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class Status(StrEnum):
    """What a finding means for running VMs with the plugin."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was seen, and what to do unless all is well."""

    name: str
    status: Status
    seen: str
    action: str = ""


@dataclass(frozen=True)
class Places:
    """Where the host shows itself; tests put trees of their own there."""

    kvm: Path = Path("/dev/kvm")
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    cgroup: Path = Path("/sys/fs/cgroup")
    etc: Path = Path("/etc")
    run: Path = Path("/run")
    modules: tuple[Path, ...] = field(
        default=(
            Path("/usr/lib/x86_64-linux-gnu/qemu"),
            Path("/usr/lib64/qemu-kvm"),
            Path("/usr/lib64/qemu"),
            Path("/usr/lib/qemu"),
        )
    )
    """QEMU's module directories of the distributions, from which AppArmor lets it map files."""


def works(checks: Iterable[Check]) -> bool:
    """Whether nothing stands in the way, as far as could be seen."""
    return all(check.status is not Status.FAIL for check in checks)


def read_text(path: Path) -> str | None:
    """A small file's text without the white space around it; None if it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
