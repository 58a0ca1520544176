# SPDX-License-Identifier: GPL-2.0-or-later
"""The arithmetic of ``adaptive``: what a run costs, and how long it is best held.

For a run let D be the price of its discard, P that and of faulting it in again, r its rent a
second. An optimum that knows the future pays min(r·t, P) for a run that is back after t, and at
most D for one that never is.
"""

from dataclasses import dataclass

import numpy as np

from qmp_upm.history import BUCKETS, EDGES_S, Floats
from qmp_upm.pages import PAGE_BYTES, Ints
from qmp_upm.prices import Prices

PUNCH_PAGES = 512
"""The plugin discards on request in punches of so many pages at most."""
HEDGE = 1 / 24
"""Of D/r: how long a run is held of which nothing is known. What never comes back costs so much
more than at once."""
FORESEEABLE_S = 900.0
"""Where D/r is longer than that, nobody can tell that a run won't be back before it."""
NEVER = 0.5
"""How often a run is taken to have never come back, beside what has been seen."""
UNSEEN = 0.5
UNSEEN_BUCKETS = 6
"""How often it is taken to have come back later than ever seen, and within how many buckets."""
TINY = 1e-30


@dataclass(frozen=True)
class Bill:
    """Arrays by run, in seconds: ``drop`` is D, ``full`` is P, ``rent`` is r."""

    drop: Floats
    full: Floats
    rent: Floats

    @classmethod
    def of(cls, prices: Prices, pages: Ints) -> "Bill":
        """For runs of so many pages."""
        drop = prices.discard_call * -(-pages // PUNCH_PAGES) + prices.discard_page * pages
        rent = np.maximum(pages * (PAGE_BYTES * prices.held_byte_second), TINY)
        return cls(drop, drop + prices.refault_page * pages, rent)

    def sure_hold(self) -> Floats:
        """How long a run may be held on no knowledge at all, in seconds.

        HEDGE·D/r, or else √(D·P)/r: then a run costs at most 1 + √(P/D) times its optimum, whether
        it is never back (rent √(D·P) and D, against D) or back just then (the rent and P, against
        the rent). No rule without chance does better.
        """
        hedge = HEDGE * self.drop
        balanced = np.sqrt(self.drop * self.full)
        return np.where(self.drop > FORESEEABLE_S * self.rent, balanced, hedge) / self.rent


def cheapest_hold(counts: Floats, bill: Bill) -> Floats:
    """The hold of least expected cost for return times as counted: arrays by run, and bucket.

    Holding for τ costs the rent until the return for what is back within τ, the rent of τ and P for
    what is back later, and the rent of τ and D for what never is. All is divided by the rent here.
    """
    never, ever = (bill.drop / bill.rent)[:, None], (bill.full / bill.rent)[:, None]
    last = BUCKETS - 1 - (counts[:, ::-1] > 0).argmax(axis=1)[:, None]
    beyond = np.arange(BUCKETS) - last
    seen = counts + (UNSEEN / UNSEEN_BUCKETS) * ((beyond > 0) & (beyond <= UNSEEN_BUCKETS))
    total = seen.sum(axis=1, keepdims=True)
    later = total - np.cumsum(seen, axis=1)
    cost = np.cumsum(seen * EDGES_S, axis=1) + later * (EDGES_S + ever) + NEVER * (EDGES_S + never)
    cost[np.broadcast_to(ever < EDGES_S, cost.shape)] = np.inf
    at_once = (total * ever + NEVER * never)[:, 0]
    return np.where(cost.min(axis=1) < at_once, EDGES_S[cost.argmin(axis=1)], 0.0)
