# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's table, measured: rounds in the lab, or on a host whose KVM has the VM type."""

from pathlib import Path
from typing import Any

from tests.lab.machine import run_scenarios
from tests.lab.scenario import Scenario

ROUND_SECONDS = 1800


def guest_rounds(rounds: int, out: Path) -> list[dict[str, Any]]:
    """All of them in one boot of the lab. LabError where it can't be had."""
    scenarios = [
        Scenario(
            policy="table",
            workload="boot",
            flips=number,
            counted=True,
            patience_seconds=ROUND_SECONDS,
            name=f"table-{number}",
        )
        for number in range(rounds)
    ]
    return run_scenarios(scenarios, out)
