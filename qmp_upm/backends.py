# SPDX-License-Identifier: GPL-2.0-or-later
"""How a decision reaches a VM: modes, budget and discards through the plugin."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

from qmp_upm.errors import CommandError, LinkError
from qmp_upm.policy import Discard
from qmp_upm.protocol import Copy, Discarded, Query, read_message
from qmp_upm.qmp import Monitor

RANGES_MOST = 4096
"""Ranges in a request."""
OUTSTANDING_MOST = 8
"""Requests that the plugin has at a time; it takes twice as many from all its clients."""
BUSY = "busy: "
"""How the plugin says that other clients have filled its queue."""
ANSWER_SECONDS = 60.0
"""After which a request that got no answer is given up, and the session with it. Not while the VM
is being launched: the plugin then discards nothing, and a VM may wait long to be started."""


@dataclass(frozen=True)
class Settings:
    """What the plugin is told once: bytes, and milliseconds."""

    budget_bytes: int
    lease_ms: int
    notify_ms: int


@dataclass(frozen=True)
class Request:
    """A discard on its way. ``sent_s``: by the session's clock, seconds."""

    id: int
    discard: Discard
    ranges: tuple[tuple[int, int, int], ...]
    sent_s: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes asked for."""
        return sum(size for _, _, size in self.ranges)


class KvmAttributes:
    """Drives the plugin of one VM. The session's task calls it and passes on its events."""

    def __init__(
        self, monitor: Monitor, settings: Settings, first_id: int, clock: Callable[[], float]
    ) -> None:
        self._monitor = monitor
        self.settings = settings
        self._next_id = first_id
        self._clock = clock
        self._waiting: deque[Request] = deque()
        self._outstanding: dict[int, Request] = {}
        self.deferred: frozenset[Copy] | None = None
        self.hold_bytes: int | None = None

    async def configure(self, defer: frozenset[Copy], hold_bytes: int | None = None) -> None:
        """Set modes, budget, lease and doorbell; starts the lease anew.

        ``hold_bytes``: what the policy holds at most, if that is less than the budget.
        """
        budget = self.settings.budget_bytes
        await self._monitor.execute(
            "x-upm-configure",
            {copy.value: "defer" if copy in defer else "eager" for copy in Copy}
            | {
                "budget": budget if hold_bytes is None else min(budget, hold_bytes),
                "lease-ms": self.settings.lease_ms,
                "on-lease-expiry": "eager",
                "notify-ms": self.settings.notify_ms,
            },
        )
        self.deferred, self.hold_bytes = defer, hold_bytes

    def submit(self, discard: Discard) -> list[Request]:
        """Queue a discard, in requests of bounded size. ``pump`` sends them."""
        requests = []
        ranges = discard.pages.ranges()
        while part := tuple(islice(ranges, RANGES_MOST)):
            requests.append(Request(self._next_id, discard, part))
            self._next_id += 1
        self._waiting += requests
        return requests

    async def pump(self) -> list[tuple[Request, CommandError]]:
        """Send what the plugin has room for; returns what it refused: its region went meanwhile.

        LinkError if it owes an answer for too long.
        """
        now = self._clock()
        late = [r for r in self._outstanding.values() if now - r.sent_s > ANSWER_SECONDS]
        if late and not await self._is_launching():
            raise LinkError(
                f"no answer to discard {late[0].id} within {ANSWER_SECONDS:.0f} s",
                hint="the session is made again, and the ledger read",
            )
        self._outstanding |= {request.id: replace(request, sent_s=now) for request in late}
        refused = []
        while self._waiting and len(self._outstanding) < OUTSTANDING_MOST:
            request = self._waiting.popleft()
            # Entered first: the event may come before the reply.
            self._outstanding[request.id] = Request(
                request.id, request.discard, request.ranges, now
            )
            try:
                await self._monitor.execute(
                    "x-upm-discard",
                    {"id": request.id, "copy": request.discard.copy, "ranges": request.ranges},
                )
            except CommandError as error:
                del self._outstanding[request.id]
                if BUSY in error.message:
                    self._waiting.appendleft(request)
                    break
                refused.append((request, error))
        return refused

    async def _is_launching(self) -> bool:
        return read_message(Query, await self._monitor.execute("x-upm-query")).launching

    def complete(self, event: Discarded) -> Request | None:
        """The request that this event ends, or None: another client's."""
        return self._outstanding.pop(event.id, None)

    @property
    def busy(self) -> bool:
        """Whether requests are queued or under way."""
        return bool(self._waiting or self._outstanding)
