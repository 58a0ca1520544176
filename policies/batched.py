# SPDX-License-Identifier: GPL-2.0-or-later
"""Collect, and discard all together when there is enough or it has waited long enough."""

from typing import Annotated, ClassVar

from pydantic import Field
from qmp_upm_policies.limits import give_all_back

from qmp_upm import policy
from qmp_upm.policy import Batch, Decision, LedgerView, Policy, Pressure
from qmp_upm.protocol import Copy
from qmp_upm.units import NSEC, Bytes, Seconds


class BatchedParameters(policy.Parameters):
    """Flushed at ``max_bytes``, or when the oldest copy has waited ``max_delay`` seconds."""

    max_bytes: Annotated[Bytes, Field(gt=0)] = 16 << 20
    max_delay: Seconds = 0.5


class Batched(Policy):
    """Everything at once, in long ranges."""

    Parameters: ClassVar[type[policy.Parameters]] = BatchedParameters

    def decide(self, batch: Batch, ledger: LedgerView, now_ns: int, pressure: Pressure) -> Decision:
        """All or nothing."""
        times = [t for copy in Copy if (t := ledger.oldest_ns(copy)) is not None]
        if not times:
            return Decision(frozenset(Copy))
        due = min(times) + int(self.parameters.max_delay * NSEC)
        enough = min(self.parameters.max_bytes, ledger.budget_bytes)
        if now_ns >= due:
            return Decision(frozenset(Copy), give_all_back(ledger, "delay"))
        if ledger.stale_bytes >= enough:
            return Decision(frozenset(Copy), give_all_back(ledger, "bytes"))
        return Decision(frozenset(Copy), wake_at_ns=due)
