# SPDX-License-Identifier: GPL-2.0-or-later
"""An event loop whose time stands still while there is something to do, and jumps when there isn't.

All that it talks to is in the same process: what is written to a socket can be read at once.
"""

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any

from qmp_upm.clock import Clock
from qmp_upm.units import NSEC


class _JumpingSelector(selectors.DefaultSelector):
    """Where others wait, it lets the time pass."""

    now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; only without any timer does it wait."""
        ready = super().select(None if timeout is None else 0)
        if not ready and timeout is not None:
            self.now_s += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` is seconds of its own, and so is ``clock``."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self.clock = Clock(self.monotonic_ns, self.time, lambda: 0.5)

    def time(self) -> float:
        """Seconds."""
        return self._jumping.now_s

    def monotonic_ns(self) -> int:
        """The same in nanoseconds."""
        return int(self._jumping.now_s * NSEC)


def run_in_virtual_time(main: Coroutine[Any, Any, Mapping[str, Any] | None]) -> Any:
    """As asyncio.run(). Inside, ``asyncio.get_running_loop()`` is a VirtualLoop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
