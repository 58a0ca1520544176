# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads for what may hang, such as a disk: they end with the process, and nobody waits for them.

The threads of asyncio's own pool are waited for when the loop ends, however a disk hangs.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class DaemonThreads(Executor):
    """One for each call, called ``name``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Call it in a new thread."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - it is whoever awaits that is told
                future.set_exception(error)

        threading.Thread(target=run, name=self._name, daemon=True).start()
        return future
