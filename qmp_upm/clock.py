# SPDX-License-Identifier: GPL-2.0-or-later
"""Time and chance, for what has to be tested without them. Timers are the event loop's."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """``monotonic_ns``: CLOCK_MONOTONIC, as in the plugin's records. ``wall``: seconds since 1970.

    ``chance``: between 0 and 1, for jitter.
    """

    monotonic_ns: Callable[[], int] = time.monotonic_ns
    wall: Callable[[], float] = time.time
    chance: Callable[[], float] = random.random

    def jittered(self, seconds: float) -> float:
        """Half of it at least: many VMs that were lost together come back one by one."""
        return seconds * (0.5 + 0.5 * self.chance())
