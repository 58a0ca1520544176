# SPDX-License-Identifier: GPL-2.0-or-later
"""Which policy suits a trace, what it would save and hold, and how sure that is.

All candidates are replayed over the whole trace, and the cheapest is advised. How sure that is,
three questions tell, none of which assumes a distribution:

- The trace is cut into windows of equally many conversions, each replayed on its own; drawn again
  and again with replacement, how often is the advised policy as good as the best (*bootstrap*)?
- Would one half of the windows have led to the same advice, and what would it have cost in the
  other (*halves*)?
- At how many prices within a factor of two of those assumed does it remain as good as the best
  (*prices*)?

A window begins with nothing learnt and nothing held, which is hard on policies that learn: the
answers err on the side of doubt. All of it is about this trace; what the guest does on another day,
no question put to it can tell.

Without a budget from elsewhere, a budget is advised, too: what the policy wants to hold at most,
with the room above it that its ``high`` asks for. What is promised is what the policy costs and
holds with that budget.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import product

import numpy as np
from numpy.typing import NDArray

from qmp_upm.policy import GROUP, Policy
from qmp_upm.prices import Prices
from qmp_upm.simulator.compare import NEVER_DISCARD, PolicySpec, Run, price
from qmp_upm.simulator.engine import UNLIMITED, Outcome, replay
from qmp_upm.simulator.optimum import find_optimum
from qmp_upm.simulator.timeline import Timeline

CANDIDATES = (
    "eager",
    "eager:copies=private",
    "eager:copies=shared",
    "batched:max_delay=50 ms",
    "batched",
    "batched:max_delay=5 s",
    "lazy:max_age=1 s",
    "lazy",
    "lazy:max_age=60 s",
    "adaptive",
    NEVER_DISCARD,
)
EAGER = CANDIDATES[0]
MIB = 1 << 20
AS_GOOD = 1.02
"""A policy that costs at most this much of the best is as good."""
WINDOWS = 12
DRAWS = 1000
PRICE_FACTORS = (0.5, 1.0, 2.0)
SURE, LIKELY = 0.9, 0.6
"""Least support of an advice that is called sure, and likely."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Support:
    """How much speaks for an advice: shares from 0 to 1, and a factor."""

    bootstrap: float
    """Share of the draws in which the policy is as good as the best."""
    halves: float
    """What the favourite of one half of the windows costs in the other, as a factor of what is best
    there; the worse of the two ways round."""
    prices: float
    """Share of the other prices at which it is as good as the best."""
    windows: int

    @property
    def verdict(self) -> str:
        """In a word: sure, likely, or unsure."""
        least = min(self.bootstrap, self.prices)
        if self.windows < WINDOWS:
            return "unsure"
        if least >= SURE and self.halves <= AS_GOOD:
            return "sure"
        return "likely" if least >= LIKELY else "unsure"


@dataclass(frozen=True)
class Advice:
    """The advised policy on the whole trace, what QEMU does by itself, and all candidates.

    ``prices``: those that it was advised for, where the policy weighs them. ``budget_bytes``: what
    it is advised for, given or found.
    """

    best: PolicySpec
    run: Run
    eager: Run
    candidates: list[Run]
    support: Support
    budget_bytes: int
    prices: Prices | None = None

    def settings(self, prices_file: str | None = None) -> str:
        """Lines of a configuration that give what is promised: policy, with prices, and budget.

        ``prices_file``: from which the prices are, if they are from one.
        """
        keys = {"name": self.best.name} | dict(self.best.parameters)
        values = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        if self.prices is not None and prices_file is not None:
            values.append(f"prices = {json.dumps(prices_file)}")
        elif self.prices is not None:
            each = (f"{name} = {price!r}" for name, price in self.prices.model_dump().items())
            values.append(f"prices = {{ {', '.join(each)} }}")
        policy = f"policy = {{ {', '.join(values)} }}"
        return f"{policy}\nbudget = {self.budget_bytes}"

    @property
    def saved_seconds(self) -> float:
        """Processor time that eager discards would have taken more; negative if less."""
        return self.eager.time_seconds - self.run.time_seconds

    def to_json(self) -> dict[str, object]:
        """As ``advise --json`` prints it: seconds, bytes, shares."""
        return {
            "policy": self.best.name,
            "parameters": dict(self.best.parameters),
            "settings": self.settings(),
            "budget_bytes": self.budget_bytes,
            "profile": self.run.profile,
            "saved_seconds": self.saved_seconds,
            "eager_seconds": self.eager.time_seconds,
            "time_seconds": self.run.time_seconds,
            "mean_stale_bytes": self.run.outcome.mean_stale_bytes,
            "peak_stale_bytes": self.run.outcome.peak_stale_bytes,
            "ratio_to_optimum": self.run.ratio_to_optimum,
            "verdict": self.support.verdict,
            "support": {
                "bootstrap": self.support.bootstrap,
                "halves": self.support.halves,
                "prices": self.support.prices,
                "windows": self.support.windows,
            },
            "candidates": [run.to_json() for run in self.candidates],
        }


def advise(
    timeline: Timeline,
    profile: str,
    prices: Prices,
    rng: np.random.Generator,
    budget_bytes: int | None = None,
) -> Advice:
    """The cheapest candidate for a trace at some prices. ``rng`` draws the windows.

    ``budget_bytes``: what the VM has; None: as much as it needs, which is then part of the advice.
    """
    limit_bytes = UNLIMITED if budget_bytes is None else budget_bytes
    names = entry_points(group=GROUP).names
    specs = [s for s in map(PolicySpec.parse, CANDIDATES) if s.name in names]
    outcomes = [replay(timeline, spec.make(prices), limit_bytes, prices) for spec in specs]
    best = find_optimum(timeline, prices)
    runs = [
        price(spec.text, profile, outcome, prices, best)
        for spec, outcome in zip(specs, outcomes, strict=True)
    ]
    costs = np.array([run.cost_seconds for run in runs])
    chosen = int(costs.argmin())
    by_window = np.array([_costs(window, specs, prices, limit_bytes) for window in _cut(timeline)])
    support = Support(
        bootstrap=_bootstrap(by_window, chosen, rng),
        halves=_halves(by_window),
        prices=_price_support(timeline, outcomes, prices, chosen),
        windows=len(by_window),
    )
    spec, run = specs[chosen], runs[chosen]
    eager = next(run for run in runs if run.policy == EAGER)
    if budget_bytes is None:
        policy = spec.make(prices)
        limit_bytes = _enough(run.outcome.peak_stale_bytes, policy)
        run = price(spec.text, profile, replay(timeline, policy, limit_bytes, prices), prices, best)
    weighed = prices if spec.weighs_prices() else None
    return Advice(spec, run, eager, runs, support, limit_bytes, weighed)


def _enough(peak_bytes: int, policy: Policy) -> int:
    """A budget of which the policy gives nothing back only because it fills up, in whole MiB.

    A conversion is deferred whole or not at all: there is room for one more.
    """
    high = float(getattr(policy.parameters, "high", 1.0)) or 1.0
    return (int(peak_bytes / high) // MIB + 1) * MIB


def _cut(timeline: Timeline) -> list[Timeline]:
    """Windows of equally many records, each up to where the next begins."""
    count = len(timeline.records)
    edges = np.linspace(0, count, min(WINDOWS, count) + 1).astype(int)
    ends = [*timeline.time_ns[edges[1:-1]].tolist(), timeline.end_ns]
    return [
        Timeline(timeline.records[low:high], end)
        for low, high, end in zip(edges[:-1], edges[1:], ends, strict=True)
    ]


def _costs(
    timeline: Timeline, specs: Sequence[PolicySpec], prices: Prices, budget_bytes: int
) -> list[float]:
    best = find_optimum(timeline, prices)
    return [
        price(
            "", "", replay(timeline, s.make(prices), budget_bytes, prices), prices, best
        ).cost_seconds
        for s in specs
    ]


def _bootstrap(by_window: Floats, chosen: int, rng: np.random.Generator) -> float:
    drawn = rng.integers(0, len(by_window), (DRAWS, len(by_window)))
    totals = by_window[drawn].sum(axis=1)
    return float((totals[:, chosen] <= AS_GOOD * totals.min(axis=1)).mean())


def _halves(by_window: Floats) -> float:
    """Windows by turns, so that both halves have some of the beginning and of the end."""
    halves = by_window[0::2].sum(axis=0), by_window[1::2].sum(axis=0)
    factors = [
        there[here.argmin()] / there.min() if there.min() > 0 else 1.0
        for here, there in (halves, halves[::-1])
    ]
    return float(max(factors))


def _price_support(
    timeline: Timeline, outcomes: Sequence[Outcome], prices: Prices, chosen: int
) -> float:
    """Discards, faults and rent each at half, as much and twice, with the same decisions."""
    good = []
    for discard, refault, rent in product(PRICE_FACTORS, repeat=3):
        other = prices.model_copy(
            update={
                "discard_call": prices.discard_call * discard,
                "discard_page": prices.discard_page * discard,
                "refault_page": prices.refault_page * refault,
                "held_gib_second": prices.held_gib_second * rent,
            }
        )
        best = find_optimum(timeline, other)
        costs = [price("", "", outcome, other, best).cost_seconds for outcome in outcomes]
        good.append(costs[chosen] <= AS_GOOD * min(costs))
    return float(np.mean(good))
