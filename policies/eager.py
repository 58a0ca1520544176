# SPDX-License-Identifier: GPL-2.0-or-later
"""Discard at the conversion, as QEMU does; for each copy, or not at all."""

from typing import ClassVar, Literal

from qmp_upm import policy
from qmp_upm.policy import Batch, Decision, LedgerView, Policy, Pressure
from qmp_upm.protocol import Copy


class EagerParameters(policy.Parameters):
    """``copies``: which to discard. What is not discarded is kept until it is used again."""

    copies: Literal["both", "private", "shared", "none"] = "both"


class Eager(Policy):
    """Keeps nothing of the copies that it names, everything of the others up to the budget."""

    Parameters: ClassVar[type[policy.Parameters]] = EagerParameters

    def decide(self, batch: Batch, ledger: LedgerView, now_ns: int, pressure: Pressure) -> Decision:
        """The same at any time."""
        copies = self.parameters.copies
        return Decision(frozenset(copy for copy in Copy if copies not in ("both", copy)))
