# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep until there is a reason: age, or a budget that fills up."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from qmp_upm import policy
from qmp_upm.policy import Batch, Decision, Discard, LedgerView, Policy, Pressure
from qmp_upm.protocol import Copy
from qmp_upm.units import NSEC, Seconds

Share = Annotated[float, Field(ge=0, le=1)]


class LazyParameters(policy.Parameters):
    """``max_age`` in seconds; above ``high`` of the budget, the oldest go down to ``low``."""

    max_age: Seconds = 10.0
    high: Share = 0.9
    low: Share = 0.7

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Lazy(Policy):
    """Oldest first."""

    Parameters: ClassVar[type[policy.Parameters]] = LazyParameters

    def decide(self, batch: Batch, ledger: LedgerView, now_ns: int, pressure: Pressure) -> Decision:
        """What is too old, and what is too much."""
        own, discards, wake = self.parameters, [], None
        excess = 0
        if ledger.stale_bytes > own.high * ledger.budget_bytes:
            excess = ledger.stale_bytes - int(own.low * ledger.budget_bytes)
        over = ledger.oldest(excess) if excess else {}
        age_ns = int(own.max_age * NSEC)
        for copy in Copy:
            old = ledger.older_than(copy, now_ns - age_ns)
            if old:
                discards.append(Discard(copy, old, "age"))
            if copy in over:
                more = over[copy]
                more -= old
                if more:
                    discards.append(Discard(copy, more, "budget"))
            oldest = ledger.oldest_ns(copy)
            if oldest is not None:
                due = max(oldest + age_ns, now_ns + NSEC // 100)
                wake = due if wake is None else min(wake, due)
        return Decision(frozenset(Copy), tuple(discards), wake)
