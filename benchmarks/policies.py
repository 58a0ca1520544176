# SPDX-License-Identifier: GPL-2.0-or-later
"""What the policies come to, and take: `python -m benchmarks.policies [--parts PART ...]`.

ratios
    Every policy on every workload at every profile: cost as a multiple of the optimum's.
random
    `adaptive` on a thousand random traces. Fails if one costs more than it may.
decisions
    Processor time of a decision on a guest of 1 TiB: what a session spends on a batch of 4,096
    conversions, to follow it in the ledger, to ask the policy, to take out what it gives back.
speed
    Conversions that the simulator replays in a second of processor time.

Only the last two depend on how busy the machine is, and they little.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from qmp_upm.ledger import Ledger
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.policy import Batch, Pressure, make_policy
from qmp_upm.records import RECORD, Records
from qmp_upm.simulator.compare import PolicySpec, Run, compare, our_policies
from qmp_upm.simulator.engine import replay
from qmp_upm.simulator.profiles import PROFILES, find_profile
from qmp_upm.simulator.workloads import WORKLOADS, make_workload

GUESTS = [name for name in WORKLOADS if name != "random"]
POLICIES = ("eager", "lazy", "batched", "adaptive")
PRICES = {name: find_profile(name) for name in PROFILES}
PROMISED = 2.0
"""What `adaptive` costs at most on a random trace, as a multiple of the optimum."""
SEEDS = 1000
ROUNDS = 3
BATCH = 4096
BATCHES = 100
EVERY_NS = 4_000_000
PAGES = (1 << 40) // PAGE_BYTES


def print_ratios(console: Console) -> bool:
    """Cost as a multiple of the optimum's, and in brackets without the conversions."""
    policies = our_policies()
    for name in GUESTS:
        table = Table(title=f"{name}: cost / optimum (of what can be avoided), mean stale")
        table.add_column("prices")
        for policy in policies:
            table.add_column(policy.text, justify="right")
        runs = compare(make_workload(name), policies, PRICES, time.process_time)
        for profile in PRICES:
            mine = [run for run in runs if run.profile == profile]
            table.add_row(profile, *(_cell(run) for run in mine))
        console.print(table)
    return True


def _cell(run: Run) -> str:
    held = run.outcome.mean_stale_bytes / (1 << 20)
    avoidable = "-" if run.avoidable_ratio is None else f"{run.avoidable_ratio:.2f}"
    return f"{run.ratio_to_optimum or 1:.3f} ({avoidable}) {held:.2f} MiB"


def print_random(console: Console) -> bool:
    """The worst and the median ratio of `adaptive`; whether all are as promised."""
    ratios: dict[str, list[float]] = {name: [] for name in PRICES}
    for seed in range(SEEDS):
        timeline = make_workload("random", seed)
        for run in compare(timeline, [PolicySpec.parse("adaptive")], PRICES, time.process_time):
            ratios[run.profile].append(run.ratio_to_optimum or 1.0)
    for profile, values in ratios.items():
        worst = int(np.argmax(values))
        console.print(
            f"adaptive on {SEEDS} random traces, prices {profile}: "
            f"median {np.median(values):.3f}, worst {values[worst]:.3f} (seed {worst}), "
            f"above {PROMISED:g}: {sum(value > PROMISED for value in values)}"
        )
    return all(max(values) <= PROMISED for values in ratios.values())


def _batch(first: np.ndarray, pages: np.ndarray, private: np.ndarray, number: int) -> Records:
    records = np.zeros(len(first), dtype=RECORD)
    records["region"], records["count"] = 1, 1
    records["offset"], records["size"] = first * PAGE_BYTES, pages * PAGE_BYTES
    records["private"] = private
    records["time_ns"] = number * EVERY_NS + np.arange(len(first)) * (EVERY_NS // BATCH)
    return records


def _random(rng: np.random.Generator, number: int) -> Records:
    """Single pages anywhere, there and back in turns: the worst for bitmaps."""
    # The same seed twice: what the even batches share, the odd ones take back.
    first = np.random.default_rng(number // 2).choice(PAGES, BATCH, replace=False)
    return _batch(rng.permutation(first), np.ones(BATCH, int), np.full(BATCH, number % 2), number)


def _hot(rng: np.random.Generator, number: int) -> Records:
    """Up to seven pages in 8 MiB, back and forth within the batch, as old firmware does."""
    first, pages = rng.integers(0, 256, BATCH) * 8, rng.integers(1, 8, BATCH)
    return _batch(first, pages, np.arange(BATCH) % 2, number)


def _sweep(_rng: np.random.Generator, number: int) -> Records:
    """2 MiB after 2 MiB to private, as a guest that accepts its memory."""
    first = (np.arange(BATCH) + BATCH * number) * 512 % PAGES
    return _batch(first, np.full(BATCH, 512), np.ones(BATCH, int), number)


PATTERNS: dict[str, Callable[[np.random.Generator, int], Records]] = {
    "random": _random,
    "hot": _hot,
    "sweep": _sweep,
}


def _decision_ms(name: str, pattern: str) -> list[float]:
    policy, ledger = make_policy(name, {}), Ledger(1 << 40)
    rng, spent = np.random.default_rng(1), []
    deferred = policy.decide(Batch(), ledger, 0, Pressure()).defer
    for number in range(BATCHES):
        records, now_ns = PATTERNS[pattern](rng, number), (number + 1) * EVERY_NS
        records["deferred"] = bool(deferred)
        begun = time.thread_time()
        ledger.apply(records, now_ns)
        decision = policy.decide(Batch(records), ledger, now_ns, Pressure())
        for discard in decision.discards:
            ledger.remove(discard.copy, discard.pages)
        spent.append((time.thread_time() - begun) * 1e3)
        deferred = decision.defer
    return spent


def print_decisions(console: Console) -> bool:
    """The median, and the 99th of a hundred."""
    table = Table(title=f"ms for a batch of {BATCH} conversions: p50 / p99", caption=_load())
    table.add_column("policy")
    for pattern, make in PATTERNS.items():
        table.add_column(f"{pattern}\n{make.__doc__}", justify="right")
    for name in POLICIES:
        cells = []
        for pattern in PATTERNS:
            quantiles = statistics.quantiles(_decision_ms(name, pattern), n=100)
            cells.append(f"{quantiles[49]:.2f} / {quantiles[98]:.2f}")
        table.add_row(name, *cells)
    console.print(table)
    return True


def print_speed(console: Console) -> bool:
    """The best of some rounds: others use the machine, too."""
    table = Table(title="thousand conversions a second", caption=_load())
    for column in ("workload", "conversions", *POLICIES):
        table.add_column(column, justify="right")
    for name in WORKLOADS:
        timeline, cells = make_workload(name), []
        for policy in POLICIES:
            spent = []
            for _ in range(ROUNDS):
                begun = time.thread_time()
                replay(timeline, make_policy(policy, {}))
                spent.append(time.thread_time() - begun)
            cells.append(f"{timeline.conversions / min(spent) / 1000:,.0f}")
        table.add_row(name, f"{timeline.conversions:,}", *cells)
    console.print(table)
    return True


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.2f}"


PARTS = {
    "ratios": print_ratios,
    "random": print_random,
    "decisions": print_decisions,
    "speed": print_speed,
}


def main() -> int:
    """Exit code 1 if a promise is not kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    console = Console(width=170, highlight=False)
    kept = [PARTS[part](console) for part in parser.parse_args().parts]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
