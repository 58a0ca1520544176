# SPDX-License-Identifier: GPL-2.0-or-later
"""The native table, measured: rounds in which the rows' QEMUs take turns of milliseconds."""

import time
from typing import Any

from benchmarks.fleet import Turn, Vm, fleet
from tests.lab.rows import BUDGET, in_turn

IDLE_SECONDS = 15.0
SAMPLE_SECONDS = 0.25
WARM_UP, REPEATS = 1, 5
TURN_MS = 40
SHAPES = ((1, 1), (8, 1), (64, 1), (512, 1), (1, 2), (1, 4))
"""Pages of a conversion and threads that convert: 4 KiB to 2 MiB."""

Raw = dict[str, Any]


def _boots(vms: list[Vm]) -> list[Raw]:
    """A boot in turn; then all idle together, and what they hold is sampled from power-on."""
    found: list[Raw] = []
    begun: list[float] = []

    def sample() -> None:
        for vm, start, raw in zip(vms, begun, found, strict=False):
            raw["samples"].append([time.monotonic() - start, vm.stale()])

    for vm in vms:
        begun.append(time.monotonic())
        found.append({"row": vm.row.name, "samples": [[0.0, 0]], "boot": vm.take(Turn("boot"))})
        sample()
    while time.monotonic() < begun[-1] + IDLE_SECONDS:
        sample()
        time.sleep(SAMPLE_SECONDS)
    sample()
    for vm, raw in zip(vms, found, strict=True):
        raw["peak_stale_bytes"] = vm.query()["stale"]["peak"] if vm.row.plugin else 0
    return found


def _flips(vms: list[Vm], found: list[Raw]) -> None:
    for raw in found:
        raw["turns"] = []
    for pages, threads in SHAPES:
        for number in range(WARM_UP + REPEATS):
            for at in range(len(vms)):
                which = (at + number) % len(vms)
                answer = vms[which].take(Turn("flips", pages, threads, TURN_MS))
                if number >= WARM_UP:
                    found[which]["turns"].append(
                        {"pages": pages, "threads": threads, "turn": number, **answer}
                    )


def native_round(number: int) -> Raw:
    """All rows once. LabError where this machine can't."""
    with fleet(in_turn(number)) as vms:
        found = _boots(vms)
        _flips(vms, found)
    return {"rows": found, "idle_seconds": IDLE_SECONDS, "budget_bytes": BUDGET}
