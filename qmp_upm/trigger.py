# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own word that tasks begin to wait for memory: a PSI trigger.

Source: Documentation/accounting/psi.rst of the kernel. Its averages are over ten seconds and are
computed every two, so that who reads them learns of pressure when it has lasted; a trigger wakes up
whoever polls its file as soon as tasks have waited for so long within a window. It says nothing of
the end. A process without CAP_SYS_RESOURCE may have windows of whole two seconds only, from Linux
6.4 on; where it may have none, the averages are read as ever.
"""

import asyncio
import os
import select
import time
from pathlib import Path
from types import TracebackType
from typing import Self

WINDOW_US = 2_000_000
TRIGGER_PERCENT = 10.0
"""Of the window in which some task waited."""
FRESH_SECONDS = 10.0
"""How long its word counts: the averages of ten seconds have it by then."""


class Trigger:
    """One, on one file; a context. Without it, `wait` only waits."""

    def __init__(self, file: Path) -> None:
        self._path = file
        self._file = -1
        self._poll: select.epoll | None = None
        self._fired = asyncio.Event()
        self._until_s = 0.0

    @property
    def is_fresh(self) -> bool:
        """Whether it has fired in the last FRESH_SECONDS."""
        return time.monotonic() < self._until_s

    def __enter__(self) -> Self:
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            # The loop waits for reading and writing only, a trigger is an exception (POLLPRI): a
            # poll set of its own can be read when it has one.
            self._poll = select.epoll()
            self._poll.register(self._file, select.EPOLLPRI)  # no plain file gets past here
            self._poll.unregister(self._file)
            threshold_us = int(WINDOW_US * TRIGGER_PERCENT / 100)
            os.write(self._file, f"some {threshold_us} {WINDOW_US}\0".encode())
            # Again: what was registered without a trigger would never be woken.
            self._poll.register(self._file, select.EPOLLPRI)
        except OSError:
            self._close()
            return self
        asyncio.get_running_loop().add_reader(self._poll.fileno(), self._on_event)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._poll is not None:
            asyncio.get_running_loop().remove_reader(self._poll.fileno())
        self._close()

    async def wait(self, seconds: float) -> None:
        """Until it fires, at most so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._fired.wait()
        except TimeoutError:
            pass
        self._fired.clear()

    def _on_event(self) -> None:
        assert self._poll is not None  # noqa: S101 - it is what the loop listens to
        for _, event in self._poll.poll(0):
            if event & select.EPOLLERR:  # the file is gone, as with a cgroup: it would never end
                asyncio.get_running_loop().remove_reader(self._poll.fileno())
                self._close()
                return
            self._until_s = time.monotonic() + FRESH_SECONDS
            self._fired.set()

    def _close(self) -> None:
        if self._poll is not None:
            self._poll.close()
            self._poll = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
