# SPDX-License-Identifier: GPL-2.0-or-later
"""The smallest useful policy: keep each stale copy for a while, then give it back."""

from typing import ClassVar

from qmp_upm import policy
from qmp_upm.policy import Batch, Decision, Discard, LedgerView, Policy, Pressure
from qmp_upm.protocol import Copy
from qmp_upm.units import NSEC, Seconds


class PatientParameters(policy.Parameters):
    """``patience``: seconds. Whatever else a configuration gives is an error, with a hint."""

    patience: Seconds = 5.0


class Patient(Policy):
    """Asked after each batch of conversions, and when the time it named has come."""

    # The daemon validates a configuration's values with this before it makes the policy.
    Parameters: ClassVar[type[policy.Parameters]] = PatientParameters

    def decide(self, batch: Batch, ledger: LedgerView, now_ns: int, pressure: Pressure) -> Decision:
        """Pure: from what it is given, and its parameters, to a decision."""
        patience_ns = int(self.parameters.patience * NSEC)
        discards, wake_at_ns = [], None
        for copy in Copy:
            # A set of pages, however many: one operation, never a loop over pages.
            pages = ledger.older_than(copy, now_ns - patience_ns)
            if pages:
                discards.append(Discard(copy, pages, "age"))
            oldest_ns = ledger.oldest_ns(copy)
            if oldest_ns is not None and oldest_ns > now_ns - patience_ns:
                due = oldest_ns + patience_ns
                wake_at_ns = due if wake_at_ns is None else min(wake_at_ns, due)
        # Keep both copies at the conversions to come; the budget bounds them whatever we say.
        return Decision(frozenset(Copy), tuple(discards), wake_at_ns)
