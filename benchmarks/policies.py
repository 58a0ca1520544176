# SPDX-License-Identifier: GPL-2.0-or-later
"""Every policy on every workload at every profile: `python -m benchmarks.policies`.

With `--random N` also `adaptive` on N random traces; with `--speed` what goes through the simulator
in a second of processor time. Nothing here depends on how busy the machine is but `--speed`.
"""

import argparse
import sys
import time
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table

from qmp_upm.simulator.compare import PolicySpec, Run, compare, our_policies
from qmp_upm.simulator.profiles import PROFILES, find_profile
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.simulator.workloads import END_NS, make_workload, random_trace

WORKLOADS = ("ovmf", "ovmf-pool", "swiotlb", "accept", "balloon", "hostile")
SPEED_ROUNDS = 5
PROMISED = 2.0
"""What `adaptive` costs at most on a random trace, as a multiple of the optimum."""
PRICES = {name: find_profile(name) for name in PROFILES}


def print_ratios(console: Console, names: Iterable[str], seed: int) -> None:
    """Cost as a multiple of the optimum's, and in brackets without the conversions."""
    policies = our_policies()
    for name in names:
        table = Table(title=f"{name}: cost / optimum (of what can be avoided), mean stale")
        table.add_column("prices")
        for policy in policies:
            table.add_column(policy.text, justify="right")
        runs = compare(make_workload(name, seed), policies, PRICES, time.process_time)
        for profile in PRICES:
            mine = [run for run in runs if run.profile == profile]
            table.add_row(profile, *(_cell(run) for run in mine))
        console.print(table)


def _cell(run: Run) -> str:
    held = run.outcome.mean_stale_bytes / (1 << 20)
    avoidable = "-" if run.avoidable_ratio is None else f"{run.avoidable_ratio:.2f}"
    return f"{run.ratio_to_optimum or 1:.3f} ({avoidable}) {held:.2f} MiB"


def print_random(console: Console, count: int, first: int) -> None:
    """The worst and the median ratio of `adaptive`."""
    ratios: dict[str, list[float]] = {name: [] for name in PRICES}
    for seed in range(first, first + count):
        timeline = Timeline(random_trace(np.random.default_rng(seed)), END_NS)
        policies = [PolicySpec.parse("adaptive")]
        for run in compare(timeline, policies, PRICES, time.process_time):
            ratios[run.profile].append(run.ratio_to_optimum or 1.0)
    for profile, values in ratios.items():
        worst = int(np.argmax(values))
        above = sum(value > PROMISED for value in values)
        console.print(
            f"adaptive on {count} random traces, prices {profile}: median {np.median(values):.3f}, "
            f"worst {values[worst]:.3f} (seed {first + worst}), above {PROMISED:g}: {above}"
        )


def print_speed(console: Console) -> None:
    """Conversions through the simulator, best of some rounds: others use the machine too."""
    timeline = make_workload("hostile")
    for policy in our_policies():
        runs = [
            compare(timeline, [policy], {"measured": PRICES["measured"]}, time.process_time)[0]
            for _ in range(SPEED_ROUNDS)
        ]
        best = max(run.conversions_per_second for run in runs)
        console.print(f"{policy.text}: {best:,.0f} conversions/s")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    console = Console(width=170, highlight=False)
    print_ratios(console, args.workload or WORKLOADS, args.seed)
    if args.random:
        print_random(console, args.random, args.seed)
    if args.speed:
        print_speed(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
