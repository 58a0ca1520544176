# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator over the price of a discard: what the policies mean where one is dear."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import PricePoint
from tests.lab.build import LabError
from tests.lab.rows import rows

WORKLOADS = ("ovmf", "swiotlb")
NAMED = ("measured", "mail-2022")
CALLS_US = (0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
MODES = {
    "eager": "eager",
    "shared discard off": "eager:copies=private",
    "private discard off": "eager:copies=shared",
    "none": "eager:copies=none",
}


def _profiles(folder: Path) -> dict[str, tuple[str, float]]:
    """By what the command is given: a profile's name in the report, and its price in µs."""
    from qmp_upm.simulator.profiles import find_profile  # noqa: PLC0415 - may not be there

    found = {name: (name, find_profile(name).discard_call * 1e6) for name in NAMED}
    base = find_profile("measured").model_dump()
    for us in CALLS_US:
        file = folder / f"call-{us}.toml"
        prices = base | {"discard_call": us / 1e6}
        lines = "".join(f"{key} = {value!r}\n" for key, value in prices.items())
        file.write_text(f"[prices]\n{lines}", encoding="utf-8")
        found[str(file)] = ("varied", us)
    return found


def price_points() -> list[PricePoint]:
    """All policies and modes on the two shapes of a boot. LabError if the simulator fails."""
    installed = {row.name for row in rows()}
    policies = MODES | {name: name for name in ("lazy", "batched", "adaptive") if name in installed}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        profiles = _profiles(Path(folder))
        for workload in WORKLOADS:
            for run in _simulate(workload, list(policies.values()), list(profiles)):
                name, us = profiles[run["profile"]]
                policy = next(p for p, text in policies.items() if text == run["policy"])
                found.append(
                    PricePoint(
                        profile=name,
                        workload=workload,
                        discard_us=round(us, 3),
                        policy=policy,
                        cost_seconds=run["cost_seconds"],
                        ratio_to_optimum=run["ratio_to_optimum"],
                        mean_stale_bytes=round(run["mean_stale_bytes"]),
                    )
                )
    return found


def _simulate(workload: str, policies: list[str], profiles: list[str]) -> list[dict[str, Any]]:
    command = [str(Path(sys.executable).with_name("qmp-upm")), "simulate", "--json"]
    command += ["--workload", workload]
    command += [part for text in policies for part in ("--policy", text)]
    command += [part for text in profiles for part in ("--profile", text)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"{' '.join(command)}:\n{done.stderr}")
    runs: list[dict[str, Any]] = json.loads(done.stdout)
    return runs
