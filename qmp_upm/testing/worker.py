# SPDX-License-Identifier: GPL-2.0-or-later
"""A model of the plugin's thread: plugin/worker.c. It discards, keeps the lease, rings the bell.

Whoever drives it calls ``step`` when ``due_ns`` says so, and after each ``wake``.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qmp_upm.pages import PAGE_BYTES
from qmp_upm.protocol import Copy
from qmp_upm.testing.ledger import FakeLedger

MSEC = 1_000_000
BUDGET_EVENT_NS = 1_000 * MSEC
RETRY_NS = 100 * MSEC
"""The first pause after a round of the drain in which all failed; the next is twice as long."""
RETRY_MOST_NS = 10_000 * MSEC
_LONG_AGO_NS = -(1 << 62)


@dataclass
class FakeRequest:
    """A discard that was asked for. ``ranges``: region, first page, end; ``asked`` in bytes."""

    id: int
    copies: tuple[Copy, ...]
    ranges: list[tuple[int, int, int]]
    asked: int
    discarded: int = 0
    error: str | None = None

    def __post_init__(self) -> None:
        self.left = deque((copy, *part) for copy in self.copies for part in self.ranges)


class FakeWorker:
    """What is due on one VM's ledger. ``wake`` is called when it may be due earlier than before."""

    def __init__(self, ledger: FakeLedger, clock_ns: Callable[[], int]) -> None:
        self.wake: Callable[[], None] = lambda: None
        self.events: deque[tuple[str, dict[str, Any]]] = deque()
        self.requests: deque[FakeRequest] = deque()
        self.lease_ms = self.notify_ms = 0
        self.keep_on_expiry = self.lease_expired = False
        self.lease_deadline_ns = 0
        self._ledger = ledger
        self._clock_ns = clock_ns
        self._bell = self._bell_armed = False
        self._bell_ns = self._budget_ns = self._retry_ns = _LONG_AGO_NS
        self._request_is_next = False
        self._tour: deque[tuple[Copy, int, int]] = deque()
        """What is left of the drain's round: copy, region, and the page to go on from."""
        self._progress = self._stuck = False
        self._retry_wait_ns = 0
        ledger.changed = self._on_conversion

    def _on_conversion(self) -> None:
        rings = self._bell_armed and not self._bell
        self._bell |= rings
        if rings or self._ledger.over_budget:
            self.wake()

    def arm(self) -> None:
        """After a configuration: ring again, and the lease begins anew."""
        self._bell_armed = self.notify_ms > 0
        self.lease_deadline_ns, self.lease_expired = 0, False
        self.wake()

    def after_read(self, *, more: bool) -> None:
        """After a read that left ``more`` to be read, or nothing."""
        self._bell_armed = self.notify_ms > 0
        self._bell = more
        self.wake()

    def renew_lease(self) -> None:
        """A command came."""
        if self.lease_ms and not self.lease_expired:
            self.lease_deadline_ns = self._clock_ns() + self.lease_ms * MSEC
            self.wake()

    def _bell_due_ns(self) -> int | None:
        due = self._bell and self._bell_armed and self.notify_ms
        return self._bell_ns + self.notify_ms * MSEC if due else None

    def due_ns(self) -> int | None:
        """When ``step`` has something to do; None: not before ``wake`` is called."""
        launching = self._ledger.launching
        times = [_LONG_AGO_NS] if self.requests and not launching else []
        if self.lease_deadline_ns:
            times.append(self.lease_deadline_ns)
        if self._ledger.excess() and not launching:
            times.append(self._retry_ns)
        if (bell_ns := self._bell_due_ns()) is not None:
            times.append(bell_ns)
        if self._ledger.over_budget:
            times.append(self._budget_ns + BUDGET_EVENT_NS)
        return min(times, default=None)

    def step(self) -> bool:
        """One thing that is due, a chunk or an event. False if nothing is."""
        now = self._clock_ns()
        bell_ns = self._bell_due_ns()
        if self.lease_deadline_ns and now >= self.lease_deadline_ns:
            self._expire_lease()
        elif bell_ns is not None and now >= bell_ns:
            self._bell = self._bell_armed = False
            self._bell_ns = now
            ring = self._ledger.ring
            self._event("X_UPM_CONVERSIONS", cursor=ring.head, dropped=ring.dropped)
        elif self._ledger.over_budget and now >= self._budget_ns + BUDGET_EVENT_NS:
            self._ledger.over_budget, self._budget_ns = False, now
            if self._ledger.budget:
                stale = self._ledger.stale_pages * PAGE_BYTES
                self._event("X_UPM_BUDGET_REACHED", stale=stale, budget=self._ledger.budget)
        else:
            return not self._ledger.launching and self._discard_step(now)
        return True

    def _discard_step(self, now: int) -> bool:
        """A chunk of the drain and of the oldest request, in turns. False if there is neither."""
        drain = bool(self._ledger.excess()) and now >= self._retry_ns
        if not drain and not self.requests:
            return False
        if self.requests and (self._request_is_next or not drain):
            if not self._request_chunk(self.requests[0]):
                self._finish(self.requests.popleft())
        else:
            self._drain_chunk(now)
        self._request_is_next = not self._request_is_next
        return True

    def _event(self, name: str, **data: object) -> None:
        self._ledger.counters["events"] += 1
        self.events.append((name, data))

    def _expire_lease(self) -> None:
        self.lease_deadline_ns, self.lease_expired = 0, True
        self._ledger.counters["lease-expiries"] += 1
        if not self.keep_on_expiry:
            self._ledger.deferring = dict.fromkeys(Copy, False)
        self._event("X_UPM_LEASE_EXPIRED", stale=self._ledger.stale_pages * PAGE_BYTES)

    def _drain_chunk(self, now: int) -> None:
        """Go round all regions. What can't be discarded is left behind until the next round."""
        if not self._tour:
            self._progress = self._stuck = False
            self._tour += ((copy, region, 0) for region in self._ledger.regions for copy in Copy)
        while self._tour:
            copy, region, at = self._tour.popleft()
            if not self._ledger.is_excess(copy):
                continue
            step = self._ledger.discard(region, copy, at, 1 << 62, "failsafe")
            if step is not None:
                self._progress |= step.error is None
                self._stuck |= step.error is not None
                self._tour.appendleft((copy, region, step.end))
                return
        if self._stuck and not self._progress:
            grown = min(2 * self._retry_wait_ns, RETRY_MOST_NS)
            self._retry_wait_ns = grown or RETRY_NS
            self._retry_ns = now + self._retry_wait_ns
        elif not self._stuck:
            self._retry_wait_ns = 0

    def _request_chunk(self, request: FakeRequest) -> bool:
        """False when nothing is left of it. What can't be discarded stays behind."""
        while request.left:
            copy, region, first, end = request.left.popleft()
            step = self._ledger.discard(region, copy, first, end, "requested")
            if step is not None:
                request.error = step.error or request.error
                request.discarded += step.discarded
                request.left.appendleft((copy, region, step.end, end))
                return True
        return False

    def _finish(self, request: FakeRequest) -> None:
        skipped = max(0, request.asked - request.discarded)
        self._ledger.counters["skipped-bytes"] += skipped
        self._event(
            "X_UPM_DISCARDED",
            id=request.id,
            discarded=request.discarded,
            skipped=skipped,
            error=request.error,
        )
