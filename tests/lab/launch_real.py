# SPDX-License-Identifier: GPL-2.0-or-later
"""Launches where memory attributes are real: software-protected VMs stand in for both kinds.

On this host's KVM if it makes such VMs, else in the lab; see machine.py.
"""

from pathlib import Path
from typing import Any

from tests.lab.inside import START_SECONDS
from tests.lab.launch import RESETS, compare, program_of
from tests.lab.launched import Setup, host_cbit, preloads
from tests.lab.machine import run_scenarios
from tests.lab.scenario import Scenario

POLICY = "launch-"
"""Before the kind, in a scenario's policy."""
ONLY = "defer both, flush"
SECONDS = 600


class LaunchReal:
    """One comparison, in the place of a ``Run``."""

    def __init__(self, scenario: Scenario, job: dict[str, Any], *_: object) -> None:
        self._scenario, self._job = scenario, job

    def result(self) -> dict[str, Any]:
        """As of ``launch()``."""
        scenario = self._scenario
        setup = Setup(
            scenario.policy.removeprefix(POLICY),
            program_of(scenario.qemu_root),
            real_attributes=True,
            patience_seconds=START_SECONDS,
        )
        return compare(setup, Path(self._job["plugin"]), ONLY, scenario.flips)

    def qemu_state(self) -> str:
        """It has ended by then."""
        return "see the runs"

    def close(self) -> None:
        """Each of its guests has been ended."""


def launch_real(
    kinds: list[str], qemu_root: str, out: Path, resets: int = RESETS
) -> list[dict[str, Any]]:
    """For each kind: both copies deferred, and discards asked for during each launch.

    A reset takes some ten seconds in the lab. Raises LabError if there is no result.
    """
    preloads()
    host_cbit()
    scenarios = [
        Scenario(
            policy=f"{POLICY}{kind}",
            flips=resets,
            qemu_root=qemu_root,
            patience_seconds=SECONDS,
            name=f"launch-{kind}",
        )
        for kind in kinds
    ]
    return run_scenarios(scenarios, out)
