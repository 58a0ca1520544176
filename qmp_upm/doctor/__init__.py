# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host and a QEMU need for qmp-upm, looked at one by one.

A check never raises and changes nothing: what it can't see is ``unknown``, and says why.
"""

from collections.abc import Sequence
from pathlib import Path

from qmp_upm.doctor.check import Check, Places, Status, works
from qmp_upm.doctor.host import check_host
from qmp_upm.doctor.kvm import Ask, ask_kvm, check_kvm
from qmp_upm.doctor.monitor import check_monitor
from qmp_upm.doctor.qemu import check_qemu, find_qemu

__all__ = ["Check", "Places", "Status", "examine", "find_qemu", "works"]


async def examine(
    qemu: Path | None,
    sockets: Sequence[Path] = (),
    places: Places | None = None,
    ask: Ask = ask_kvm,
) -> list[Check]:
    """All checks, in the order in which to mend what fails."""
    where = places or Places()
    checks = [*check_kvm(where, ask), *check_qemu(qemu, where), *check_host(where)]
    for socket in sockets:
        checks.append(await check_monitor(socket))  # noqa: PERF401 - one monitor after the other
    return checks
