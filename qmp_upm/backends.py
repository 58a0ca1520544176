# SPDX-License-Identifier: GPL-2.0-or-later
"""How a decision reaches a VM: modes, budget and discards through the plugin."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qmp_upm.errors import CommandError, LinkError
from qmp_upm.pages import PAGE_BYTES, PageSet, Runs
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
    """A discard on its way. ``runs``: its part of the pages; None: all that is stale of the copy.

    ``sent_s``: by the session's clock, seconds.
    """

    id: int
    discard: Discard
    runs: Runs | None
    sent_s: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes asked for; of a whole copy, those that were known to be stale."""
        if self.runs is None:
            return self.discard.pages.bytes
        return int(self.runs.pages.sum()) * PAGE_BYTES

    @property
    def pages(self) -> PageSet | None:
        """Those asked for; None: all of the copy."""
        return None if self.runs is None else PageSet.of_runs(self.runs)

    def arguments(self) -> dict[str, object]:
        """The arguments of x-upm-discard. Lists of ranges are long, and made when they are sent."""
        asked: dict[str, object] = {"id": self.id, "copy": self.discard.copy}
        if self.runs is None:
            return asked | {"all": True}
        region, first, pages = self.runs
        columns = (region, first * PAGE_BYTES, pages * PAGE_BYTES)
        return asked | {"ranges": list(zip(*(c.tolist() for c in columns), strict=True))}


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

    def submit(self, discard: Discard, *, everything: bool = False) -> list[Request]:
        """Queue a discard, in requests of bounded size. ``pump`` sends them.

        ``everything``: of its copy, in one request, whatever has become stale meanwhile.
        """
        runs = discard.pages.runs()
        parts: list[Runs | None] = [
            Runs(*(column[at : at + RANGES_MOST] for column in runs))
            for at in range(0, len(runs.region), RANGES_MOST)
        ]
        if everything and parts:
            parts = [None]
        requests = [Request(self._next_id + i, discard, part) for i, part in enumerate(parts)]
        self._next_id += len(requests)
        self._waiting += requests
        return requests

    def take_out(self, stale: Mapping[Copy, PageSet]) -> None:
        """Take out of a ledger that was just read what is asked for and not finished."""
        for request in (*self._waiting, *self._outstanding.values()):
            copy, pages = request.discard.copy, request.pages
            stale[copy].subtract(stale[copy].copy() if pages is None else pages)

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
            self._outstanding[request.id] = replace(request, sent_s=now)
            try:
                await self._monitor.execute("x-upm-discard", request.arguments())
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
