# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep until there is a reason: age, a budget that fills up, or a host short of memory."""

from typing import Any, ClassVar

from qmp_upm_policies.limits import LimitParameters, Limits, give_all_back

from qmp_upm import policy
from qmp_upm.policy import Batch, Decision, Discard, LedgerView, Policy, Pressure
from qmp_upm.protocol import Copy
from qmp_upm.units import NSEC

AGAIN_NS = NSEC // 100
"""What comes of age within that is discarded together."""


class Lazy(Policy):
    """Oldest first."""

    Parameters: ClassVar[type[policy.Parameters]] = LimitParameters

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self._limits = Limits(parameters)

    def decide(self, batch: Batch, ledger: LedgerView, now_ns: int, pressure: Pressure) -> Decision:
        """What is too old, and what is too much."""
        if self._limits.is_pressed(pressure):
            return Decision(discards=give_all_back(ledger, "pressure"))
        age_ns = int(self.parameters.max_age * NSEC)
        over = {discard.copy: discard.pages for discard in self._limits.over_budget(ledger)}
        discards, wakes = [], []
        for copy in Copy:
            oldest_ns = ledger.oldest_ns(copy)
            if oldest_ns is None:
                continue
            wakes.append(max(oldest_ns + age_ns, now_ns + AGAIN_NS))
            old = ledger.older_than(copy, now_ns - age_ns)
            more = over.get(copy)
            if old:
                discards.append(Discard(copy, old, "age"))
            if more is not None:
                more -= old
                discards.append(Discard(copy, more, "budget"))
        return Decision(
            frozenset(Copy), tuple(d for d in discards if d.pages), min(wakes, default=None)
        )
