# SPDX-License-Identifier: GPL-2.0-or-later
"""Policies side by side on one timeline, at one or several sets of prices."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from qmp_upm.errors import ConfigError
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.policy import GROUP, Policy, make_policy
from qmp_upm.prices import Prices
from qmp_upm.simulator.engine import UNLIMITED, Outcome, replay
from qmp_upm.simulator.optimum import Optimum, find_optimum
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.units import NSEC

NEVER_DISCARD = "eager:copies=none"


@dataclass(frozen=True)
class PolicySpec:
    """A policy and its parameters as written: ``NAME`` or ``NAME:key=value,key=value``."""

    text: str
    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "PolicySpec":
        """Raises ConfigError if it is not of that form; a wrong value shows in ``make``."""
        name, _, rest = text.partition(":")
        parameters = {}
        for part in filter(None, rest.split(",")):
            key, given, value = part.partition("=")
            if not given or not key.strip():
                raise ConfigError(
                    f"policy {text!r}: {part!r} is no parameter",
                    hint="write NAME:key=value,key=value, for example lazy:max_age=5 s,high=0.8",
                )
            parameters[key.strip()] = value.strip()
        return cls(text, name.strip(), parameters)

    def make(self, prices: Prices) -> Policy:
        """The policy. One that weighs prices is given these, unless others are written."""
        given: dict[str, object] = {"prices": prices} if self.weighs_prices() else {}
        return make_policy(self.name, given | dict(self.parameters))

    def weighs_prices(self) -> bool:
        """Whether it takes prices, as ``adaptive`` does, and none are written."""
        fields = type(make_policy(self.name, self.parameters)).Parameters.model_fields
        return "prices" in fields and "prices" not in self.parameters


def our_policies() -> list[PolicySpec]:
    """Those that come with qmp-upm, and never discarding."""
    ours = [
        entry.name
        for entry in entry_points(group=GROUP)
        if entry.value.startswith("qmp_upm_policies.")
    ]
    return [PolicySpec.parse(text) for text in (*sorted(ours), NEVER_DISCARD)]


@dataclass(frozen=True)
class Run:
    """A policy on a timeline at some prices."""

    policy: str
    profile: str
    outcome: Outcome
    optimum: Optimum
    time_seconds: float
    """Conversions, discards and faults."""
    rent_seconds: float
    conversions_per_second: float
    """Through the simulator, per second of processor time; not of the guest."""

    @property
    def cost_seconds(self) -> float:
        """Time and rent."""
        return self.time_seconds + self.rent_seconds

    @property
    def ratio_to_optimum(self) -> float | None:
        """Of the whole costs; None if neither costs anything."""
        return _ratio(self.cost_seconds, self.optimum.cost_seconds)

    @property
    def avoidable_ratio(self) -> float | None:
        """The same without the conversions, which all have to pay."""
        spared = self.optimum.unavoidable_seconds
        return _ratio(self.cost_seconds - spared, self.optimum.cost_seconds - spared)

    def to_json(self) -> dict[str, object]:
        """As ``simulate --json`` prints it: seconds and bytes."""
        account = self.outcome.account
        return {
            "policy": self.policy,
            "profile": self.profile,
            "cost_seconds": self.cost_seconds,
            "time_seconds": self.time_seconds,
            "rent_seconds": self.rent_seconds,
            "optimum_seconds": self.optimum.cost_seconds,
            "ratio_to_optimum": self.ratio_to_optimum,
            "avoidable_ratio": self.avoidable_ratio,
            "peak_stale_bytes": self.outcome.peak_stale_bytes,
            "mean_stale_bytes": self.outcome.mean_stale_bytes,
            "final_stale_bytes": self.outcome.final_stale_bytes,
            "conversions": self.outcome.timeline.conversions,
            "discards": self.outcome.discards,
            "discarded_bytes": self.outcome.discarded_bytes,
            "reused_bytes": account.reused_pages * PAGE_BYTES,
            "refaulted_bytes": account.refaulted_pages * PAGE_BYTES,
            "dropped": self.outcome.dropped,
            "fallen_back": self.outcome.fallen_back,
            "conversions_per_second": self.conversions_per_second,
        }


def compare(
    timeline: Timeline,
    policies: Iterable[PolicySpec],
    profiles: Mapping[str, Prices],
    clock: Callable[[], float],
    *,
    budget_bytes: int = UNLIMITED,
) -> list[Run]:
    """Every policy at every profile. ``clock``: seconds of processor time, for the simulator's own.

    A policy that does not weigh prices runs once, whatever the profiles.
    """
    optima = {name: find_optimum(timeline, prices) for name, prices in profiles.items()}
    runs = []
    for spec in policies:
        known: tuple[Outcome, float] | None = None
        for name, prices in profiles.items():
            if known is None or spec.weighs_prices():
                start = clock()
                outcome = replay(timeline, spec.make(prices), budget_bytes, prices)
                known = outcome, timeline.conversions / max(clock() - start, 1e-9)
            outcome, speed = known
            runs.append(
                price(
                    spec.text,
                    name,
                    outcome,
                    prices,
                    optima[name],
                    conversions_per_second=speed,
                )
            )
    return runs


def price(
    policy: str,
    profile: str,
    outcome: Outcome,
    prices: Prices,
    optimum: Optimum,
    *,
    conversions_per_second: float = 0.0,
) -> Run:
    """What an outcome costs at these prices."""
    account = outcome.account
    time_seconds = (
        prices.conversion * outcome.timeline.conversions
        + prices.discard_call * outcome.discards
        + prices.discard_page * (account.inline_pages + account.requested_pages)
        + prices.refault_page * account.refaulted_pages
    )
    rent_seconds = prices.held_byte_second * account.page_ns / NSEC * PAGE_BYTES
    return Run(
        policy, profile, outcome, optimum, time_seconds, rent_seconds, conversions_per_second
    )


def _ratio(cost: float, best: float) -> float | None:
    if best > 0:
        return cost / best
    return None if cost > 0 else 1.0
