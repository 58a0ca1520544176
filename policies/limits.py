# SPDX-License-Identifier: GPL-2.0-or-later
"""What makes any deferring policy let go: the budget filling up, and the host short of memory."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from qmp_upm import policy
from qmp_upm.policy import Discard, LedgerView, Pressure
from qmp_upm.protocol import Copy
from qmp_upm.units import Seconds

Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(gt=0, le=100)]


class LimitParameters(policy.Parameters):
    """``max_age``: seconds that a copy is held at most, whatever else speaks for it.

    Above ``high`` of the budget, the oldest copies go until ``low`` of it is held. From
    ``pressure`` on (percent of the last ten seconds in which tasks of the host, or of the VM's
    cgroup, waited for memory) everything goes, and nothing is kept until half of it is reached.
    """

    max_age: Seconds = 10.0
    high: Share = 0.9
    low: Share = 0.7
    pressure: Percent = 10.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Limits:
    """The limits of one VM, and whether it is being pressed."""

    def __init__(self, parameters: LimitParameters) -> None:
        self._own = parameters
        self._pressed = False

    def is_pressed(self, pressure: Pressure) -> bool:
        """Whether nothing may be held. Ends at half of what it begins at, so that it can't flap."""
        self._pressed = pressure.some_percent >= self._own.pressure / (2 if self._pressed else 1)
        return self._pressed

    def over_budget(self, ledger: LedgerView) -> list[Discard]:
        """The oldest copies above ``low``, once ``high`` is passed."""
        if ledger.stale_bytes <= self._own.high * ledger.budget_bytes:
            return []
        excess = ledger.stale_bytes - int(self._own.low * ledger.budget_bytes)
        return [Discard(copy, pages, "budget") for copy, pages in ledger.oldest(excess).items()]


def give_all_back(ledger: LedgerView, reason: str) -> tuple[Discard, ...]:
    """Everything that is stale."""
    discards = (Discard(copy, ledger.stale(copy), reason) for copy in Copy)
    return tuple(discard for discard in discards if discard.pages)
