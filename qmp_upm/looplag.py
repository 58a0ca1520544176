# SPDX-License-Identifier: GPL-2.0-or-later
"""How late the event loop is: what every VM waits for when one task works for too long."""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable

PERIOD_SECONDS = 0.25
"""Between two looks: four wake-ups a second are all that an idle daemon pays."""
BOUNDS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper ends of the histogram's buckets; one more has none."""


class LoopLag:
    """A timer that looks how late it is called. It runs in the loop that it measures."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self.counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self.total_seconds = 0.0

    async def run(self, each: Callable[[float], None]) -> None:
        """Measure until cancelled; ``each`` is called with the lag in seconds."""
        while True:
            due = self._clock() + PERIOD_SECONDS
            await self._sleep(PERIOD_SECONDS)
            lag = max(0.0, self._clock() - due)
            self.counts[bisect_left(BOUNDS_SECONDS, lag)] += 1
            self.total_seconds += lag
            each(lag)
