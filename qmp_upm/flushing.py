# SPDX-License-Identifier: GPL-2.0-or-later
"""A flush that somebody has asked for, until the plugin has finished it."""

import asyncio


class FlushUnderWay:
    """The requests that are not finished, and the bytes of those that are."""

    def __init__(self, done: asyncio.Future[int]) -> None:
        self.done = done
        self.waiting: set[int] = set()
        self.given_back = 0

    def finish(self, request: int, discarded: int) -> None:
        """One of its requests is over."""
        if request in self.waiting:
            self.waiting.discard(request)
            self.given_back += discarded
            self.settle()

    def settle(self) -> None:
        """Answer, if nothing is under way."""
        if not self.waiting and not self.done.done():
            self.done.set_result(self.given_back)
