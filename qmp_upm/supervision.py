# SPDX-License-Identifier: GPL-2.0-or-later
"""Tasks that must not end: one that dies of a defect is seen, counted and begun again.

Whoever else runs beside it does not notice.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import structlog

from qmp_upm.clock import Clock
from qmp_upm.units import NSEC

TASKS = ("session", "discovery", "pressure", "balancer", "telemetry", "memory")
"""What is looked after."""
RESTART_SECONDS = 1.0
"""The pause after the first death; it doubles with each that follows soon."""
RESTART_MOST = 60.0
"""The longest pause. What has lived for longer begins with the first one again."""

log = structlog.get_logger()


class Supervisor:
    """``deaths``: how often each kind of task has died."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.deaths: Counter[str] = Counter()
        self._clock = clock or Clock()

    async def keep(
        self, task: str, run: Callable[[], Awaitable[None]], name: Callable[[], str] = str
    ) -> None:
        """Run it until it returns or is cancelled, and again whenever it raises.

        ``task``: one of TASKS. ``name``: the VM that it is about, if it is about one.
        """
        pause = RESTART_SECONDS
        while True:
            begun_ns = self._clock.monotonic_ns()
            try:
                await run()
            except Exception:
                self.deaths[task] += 1
                log.exception("task-died", task=task, vm=name(), hint="report this; it goes on")
            else:
                return
            if self._clock.monotonic_ns() - begun_ns > RESTART_MOST * NSEC:
                pause = RESTART_SECONDS
            await asyncio.sleep(self._clock.jittered(pause))
            pause = min(2 * pause, RESTART_MOST)
