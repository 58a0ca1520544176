# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator over the price of a discard: what the policies mean where one is dear."""

import time

from benchmarks.results import PricePoint
from qmp_upm.simulator.compare import PolicySpec, compare
from qmp_upm.simulator.profiles import find_profile
from qmp_upm.simulator.workloads import make_workload
from tests.lab.rows import OURS, rows

WORKLOADS = ("ovmf", "swiotlb")
NAMED = ("measured", "mail-2022")
CALLS_US = (0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)
MODES = {
    "eager": "eager",
    "eager:copies=private": "shared discard off",
    "eager:copies=shared": "private discard off",
    "eager:copies=none": "none",
}


def price_points() -> list[PricePoint]:
    """All policies and modes on the two shapes of a boot."""
    policies = MODES | {row.name: row.name for row in rows() if row.name in OURS}
    prices = {name: find_profile(name) for name in NAMED}
    for us in CALLS_US:
        call = {"discard_call": us / 1e6}
        prices[f"{us} µs"] = prices["measured"].model_copy(update=call)
    return [
        PricePoint(
            profile=run.profile if run.profile in NAMED else "varied",
            workload=workload,
            discard_us=round(prices[run.profile].discard_call * 1e6, 3),
            policy=policies[run.policy],
            cost_seconds=run.cost_seconds,
            ratio_to_optimum=run.ratio_to_optimum,
            mean_stale_bytes=round(run.outcome.mean_stale_bytes),
        )
        for workload in WORKLOADS
        for run in compare(
            make_workload(workload), map(PolicySpec.parse, policies), prices, time.process_time
        )
    ]
