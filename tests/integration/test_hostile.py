# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile QEMUs of every kind at once, beside a few healthy ones: `benchmarks.hostile`, in short.

Real: the daemon, and processes and sockets of all VMs. Simulated: QEMU with the plugin.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_hostile_vms_are_their_own_trouble() -> None:
    """Healthy VMs react, the daemon stays small, and each hostile VM's state says what it did."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.hostile", "--json"),
            *("--vms", "5", "--seconds", "20", "--kind", "all"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)["all"]
    assert found["healthy_reactions"] > 0
    assert found["resident_mib_most"] < 200
    states = "\n".join(found["states"])
    assert "that nobody asked for" in states
    assert "is served as" in states
    assert "x-upm-query" in states
