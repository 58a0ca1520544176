# SPDX-License-Identifier: GPL-2.0-or-later
"""What `adaptive` has to show: how near it comes to the optimum, whatever the prices."""

import time

import numpy as np
import pytest

from qmp_upm.simulator.compare import NEVER_DISCARD, PolicySpec, Run, compare
from qmp_upm.simulator.profiles import PROFILES, find_profile
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.simulator.workloads import END_NS, make_workload, random_trace

HONEST = ("ovmf", "ovmf-pool", "swiotlb", "accept", "balloon")
PRICES = {name: find_profile(name) for name in PROFILES}
ADAPTIVE = PolicySpec.parse("adaptive")
HARD = (101, 150, 332, 396, 415, 850)
"""Random traces that adaptive finds the hardest of the first thousand, and 332: a long run is lost
there if short ones before it that came back were trials enough."""


def runs_of(timeline: Timeline, *policies: PolicySpec) -> list[Run]:
    """Every policy at every profile."""
    return compare(timeline, policies, PRICES, time.process_time)


@pytest.mark.parametrize("name", HONEST)
def test_adaptive_is_near_the_optimum(name: str) -> None:
    """At most 1.1 times the cost of a policy that knows the future, at any of the profiles."""
    ratios = {r.profile: r.ratio_to_optimum for r in runs_of(make_workload(name), ADAPTIVE)}
    assert all(ratio is not None and ratio <= 1.1 for ratio in ratios.values()), ratios


def test_adaptive_withstands_a_hostile_guest() -> None:
    """At most twice the optimum."""
    ratios = {r.profile: r.ratio_to_optimum for r in runs_of(make_workload("hostile"), ADAPTIVE)}
    assert all(ratio is not None and ratio <= 2 for ratio in ratios.values()), ratios


def test_adaptive_spends_and_holds_little_on_ovmf() -> None:
    """At most 2 % more time than never discarding, and at most a tenth of the memory."""
    runs = runs_of(make_workload("ovmf"), ADAPTIVE, PolicySpec.parse(NEVER_DISCARD))
    for run, never in zip(runs[: len(PRICES)], runs[len(PRICES) :], strict=True):
        assert run.profile == never.profile
        assert run.time_seconds <= 1.02 * never.time_seconds
        assert run.outcome.mean_stale_bytes <= 0.1 * never.outcome.mean_stale_bytes


def test_adaptive_is_competitive_on_random_traces() -> None:
    """At most twice the optimum; `python -m benchmarks.policies --parts random` has 1,000."""
    for seed in (*range(12), *HARD):
        timeline = Timeline(random_trace(np.random.default_rng(seed)), END_NS)
        for run in runs_of(timeline, ADAPTIVE):
            assert run.ratio_to_optimum is not None
            assert run.ratio_to_optimum <= 2, (seed, run.profile)
