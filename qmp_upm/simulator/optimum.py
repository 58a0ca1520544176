# SPDX-License-Identifier: GPL-2.0-or-later
"""What a policy could do at best that knew the future: the bound that others are compared with.

From the conversion by which a page leaves a copy until the next conversion of that page, a policy
can hold the stale copy and pay rent, or give it back and pay the discard, and the fault if the
guest comes back for it. To discard at once is never worse than to discard later; so each page, copy
and interval costs at least the lesser of the two, and the sum is a lower bound for any policy.

A hole punch covers neighbours. Its price is shared among as many pages as could ever be stale side
by side in that copy; a page never bears less under any policy. The budget is left aside: without it
the bound is lower still.
"""

from dataclasses import dataclass

import numpy as np

from qmp_upm.pages import PAGE_BYTES
from qmp_upm.prices import Prices
from qmp_upm.simulator.timeline import NEVER, Timeline
from qmp_upm.units import NSEC


@dataclass(frozen=True)
class Optimum:
    """``time_seconds``: conversions, discards and faults. ``rent_seconds``: what is held."""

    time_seconds: float
    rent_seconds: float
    unavoidable_seconds: float
    """The conversions alone."""
    peak_stale_bytes: int
    mean_stale_bytes: float

    @property
    def cost_seconds(self) -> float:
        """All of it."""
        return self.time_seconds + self.rent_seconds


def find_optimum(timeline: Timeline, prices: Prices) -> Optimum:
    """The clairvoyant optimum of a trace under these prices."""
    pages = timeline.touch_pages
    start_ns = timeline.time_ns[timeline.touch_record]
    again = timeline.touch_after != NEVER
    after = np.where(again, timeline.touch_after, 0)
    end_ns = np.where(again, start_ns[after], timeline.end_ns)
    returns = again & timeline.touch_returns[after]
    seconds = (end_ns - start_ns) / NSEC
    row = np.where(
        timeline.touch_private,
        timeline.run_pages[False][timeline.touch_extent],
        timeline.run_pages[True][timeline.touch_extent],
    )
    hold = pages * PAGE_BYTES * prices.held_byte_second * seconds
    drop = pages * (prices.discard_page + prices.discard_call / row + prices.refault_page * returns)
    kept = hold < drop
    conversions = prices.conversion * timeline.conversions
    held_bytes = pages[kept] * PAGE_BYTES
    return Optimum(
        time_seconds=conversions + float(drop[~kept].sum()),
        rent_seconds=float(hold[kept].sum()),
        unavoidable_seconds=conversions,
        peak_stale_bytes=_peak(start_ns[kept], end_ns[kept], held_bytes),
        mean_stale_bytes=float((held_bytes * seconds[kept]).sum()) / (timeline.seconds or 1.0),
    )


def _peak(start_ns: np.ndarray, end_ns: np.ndarray, size: np.ndarray) -> int:
    """The most bytes of intervals at any time; what ends then is gone."""
    times = np.concatenate([end_ns, start_ns])
    steps = np.concatenate([-size, size])
    order = np.argsort(times, kind="stable")
    return int(np.cumsum(steps[order]).max(initial=0))
