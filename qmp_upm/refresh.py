# SPDX-License-Identifier: GPL-2.0-or-later
"""When a session asks for the plugin's figures, and when it reads the ledger because of them.

What the plugin gives back by itself, for a smaller budget, a mode, a lease or a region that goes,
no event tells; nor which pages of a request failed.
"""

from qmp_upm.clock import Clock
from qmp_upm.units import NSEC

REFRESH_SECONDS = 3.0
"""How old the plugin's counters may be after they have changed."""
HOLDING_SECONDS = 30.0
"""How old they may be while the VM holds something: QEMU may close a region without a word."""
PATIENCE_SECONDS = 60.0
"""The longest pause before a discard that failed is tried again, or the ledger is read again."""
COMPANIES = 16
"""Sessions do together, in so many groups, what has some time; jitter spreads half of them."""


def in_company(clock: Clock, seconds: float) -> int:
    """A time, in nanoseconds, that comes after so long at most.

    VMs that do the same at the same time come neither all at once, which others would feel, nor
    one by one, for each of which the daemon would wake up.
    """
    due_ns = clock.monotonic_ns() + int(clock.jittered(seconds) * NSEC)
    return due_ns - due_ns % max(1, int(seconds * NSEC) // COMPANIES)


class Refresh:
    """``due_ns``: when to ask, None if nothing can have changed. ``doubt``: the mirror is wrong."""

    def __init__(self, clock: Clock) -> None:
        self.due_ns: int | None = None
        self.doubt = False
        self.patience_ns = 0
        self._clock = clock
        self._wanted = False
        self._failures = 0

    @property
    def is_due(self) -> bool:
        """Whether it is time to ask."""
        return self.due_ns is not None and self._clock.monotonic_ns() >= self.due_ns

    @property
    def is_patient(self) -> bool:
        """Whether the last failure is long enough ago to read the ledger, and so to try again."""
        return self._clock.monotonic_ns() >= self.patience_ns

    def want(self) -> None:
        """Something has changed."""
        if not self._wanted:
            self._wanted = True
            self.due_ns = in_company(self._clock, REFRESH_SECONDS)

    def want_within(self, seconds: float) -> None:
        """Something has changed that a policy is waiting for."""
        self.want()
        soon_ns = self._clock.monotonic_ns() + int(seconds * NSEC)
        self.due_ns = min(self.due_ns or soon_ns, soon_ns)

    def taken(self, *, holds: bool) -> None:
        """The figures are here; while the VM holds something, they are asked for again."""
        self._wanted = False
        self.due_ns = in_company(self._clock, HOLDING_SECONDS) if holds else None

    def on_failed(self) -> None:
        """A discard failed, in whole or in part: a pause, twice as long each time."""
        self.doubt = True
        self.on_differs()

    def on_differs(self) -> None:
        """The ledger is read anew: the next time not before a pause, twice as long each time.

        A plugin that contradicts itself would have it read for ever.
        """
        if self.is_patient:
            pause_s = min(REFRESH_SECONDS * 2**self._failures / 2, PATIENCE_SECONDS)
            self._failures += 1
            self.patience_ns = self._clock.monotonic_ns() + int(pause_s * NSEC)

    def on_well(self) -> None:
        """A discard was made, or the figures agree."""
        self._failures = self.patience_ns = 0
