# SPDX-License-Identifier: GPL-2.0-or-later
"""What a decision costs on a guest of 1 TiB: ``python -m benchmarks.decisions [--json]``.

Batches of 4,096 conversions, 4 ms apart, for each policy and pattern:

random
    Single pages anywhere in 1 TiB, there and back in turns: the worst for bitmaps.
hot
    Runs of up to seven pages in 8 MiB, back and forth within the batch, as old firmware does.
sweep
    2 MiB after 2 MiB to private, as a guest that accepts its memory.

Of processor time of the one thread, so that other load hardly changes it. ``decision_ms`` is what a
session spends on a batch: to follow it in the ledger, to ask the policy, to take out what it gives
back. ``conversions_per_second`` is the simulator's on ``hostile``, a million conversions.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from qmp_upm.ledger import Ledger
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.policy import Batch, Pressure, make_policy
from qmp_upm.records import RECORD, Records
from qmp_upm.simulator.engine import replay
from qmp_upm.simulator.workloads import make_workload

BATCH = 4096
BATCHES = 100
EVERY_NS = 4_000_000
PAGES = (1 << 40) // PAGE_BYTES
POLICIES = ("eager", "lazy", "batched", "adaptive")


def _batch(first: np.ndarray, pages: np.ndarray, private: np.ndarray, number: int) -> Records:
    records = np.zeros(len(first), dtype=RECORD)
    records["region"], records["count"] = 1, 1
    records["offset"], records["size"] = first * PAGE_BYTES, pages * PAGE_BYTES
    records["private"] = private
    records["time_ns"] = number * EVERY_NS + np.arange(len(first)) * (EVERY_NS // BATCH)
    return records


def _random(rng: np.random.Generator, number: int) -> Records:
    # The same seed twice: what the even batches share, the odd ones take back.
    first = np.random.default_rng(number // 2).choice(PAGES, BATCH, replace=False)
    return _batch(rng.permutation(first), np.ones(BATCH, int), np.full(BATCH, number % 2), number)


def _hot(rng: np.random.Generator, number: int) -> Records:
    first, pages = rng.integers(0, 256, BATCH) * 8, rng.integers(1, 8, BATCH)
    return _batch(first, pages, np.arange(BATCH) % 2, number)


def _sweep(_rng: np.random.Generator, number: int) -> Records:
    first = (np.arange(BATCH) + BATCH * number) * 512 % PAGES
    return _batch(first, np.full(BATCH, 512), np.ones(BATCH, int), number)


PATTERNS: dict[str, Callable[[np.random.Generator, int], Records]] = {
    "random": _random,
    "hot": _hot,
    "sweep": _sweep,
}


def decisions(name: str, pattern: str) -> dict[str, object]:
    """Milliseconds that a decision takes: the median, the 99th percentile, the most."""
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
    p50, p99 = (statistics.quantiles(spent, n=100)[at] for at in (49, 98))
    return {
        "policy": name,
        "pattern": pattern,
        "decision_ms_p50": round(p50, 2),
        "decision_ms_p99": round(p99, 2),
        "decision_ms_max": round(max(spent), 2),
    }


def throughput(name: str) -> dict[str, object]:
    """Conversions that the simulator replays through it in a second of processor time."""
    timeline = make_workload("hostile")
    begun = time.thread_time()
    replay(timeline, make_policy(name, {}))
    seconds = time.thread_time() - begun
    return {"policy": name, "conversions_per_second": round(timeline.conversions / seconds)}


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = {
        "decisions": [decisions(name, pattern) for name in POLICIES for pattern in PATTERNS],
        "throughput": [throughput(name) for name in POLICIES],
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for row in result["decisions"] + result["throughput"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
