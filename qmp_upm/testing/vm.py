# SPDX-License-Identifier: GPL-2.0-or-later
"""A fake VM: a QEMU with the plugin, whose guest converts when it is told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self

from qmp_upm.protocol import COMMANDS
from qmp_upm.testing.faults import Plan
from qmp_upm.testing.peer import FakeQemu
from qmp_upm.testing.plugin import FakePlugin
from qmp_upm.units import NSEC

STEPS_MOST = 64
"""Chunks and events after which the rest of the process has its turn."""
BASIC = ("qmp_capabilities", "query-commands", "query-name", "query-uuid", "query-status")


class FakeVm(FakeQemu):
    """``name``: what query-name answers. ``plugin``: its ledger; convert there.

    It lives in the event loop that it listens in, and so does its plugin.
    """

    def __init__(
        self,
        plugin: FakePlugin,
        plan: Plan | None = None,
        *,
        name: str = "guest",
        uuid: str = "00000000-0000-0000-0000-000000000000",
    ) -> None:
        super().__init__(self._handle, plan)
        self.name = name
        self.uuid = uuid
        self.plugin = plugin
        self._timer: asyncio.Handle | None = None
        self._timer_ns = 0

    @contextlib.asynccontextmanager
    async def listening(self, path: str | Path) -> AsyncIterator[Self]:
        """Listen, with the plugin at work."""
        self.plugin.worker.wake = self._set_timer
        self._set_timer()
        try:
            async with super().listening(path):
                yield self
        finally:
            self.plugin.worker.wake = lambda: None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _handle(self, command: str, arguments: Mapping[str, Any]) -> object:
        answers: dict[str, object] = {
            "query-commands": [{"name": name} for name in (*BASIC, *sorted(COMMANDS))],
            "query-name": {"name": self.name},
            "query-uuid": {"UUID": self.uuid},
            "query-status": {"status": "running", "running": True},
        }
        return answers[command] if command in answers else self.plugin(command, arguments)

    def _set_timer(self) -> None:
        """Work when it is due. A timer that runs out too early finds nothing, and is set again."""
        due_ns = self.plugin.worker.due_ns()
        if due_ns is None or (self._timer is not None and self._timer_ns <= due_ns):
            return
        if self._timer is not None:
            self._timer.cancel()
        wait_s = max(0.0, (due_ns - self.plugin.clock_ns()) / NSEC)
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._work)
        self._timer_ns = due_ns

    def _work(self) -> None:
        self._timer = None
        worker = self.plugin.worker
        for _ in range(STEPS_MOST):
            if not worker.step():
                break
            while worker.events:
                self.emit(*worker.events.popleft())
        self._set_timer()
