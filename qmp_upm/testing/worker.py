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
        times = [_LONG_AGO_NS] if self.requests else []
        if self.lease_deadline_ns:
            times.append(self.lease_deadline_ns)
        if self._ledger.excess():
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
        elif (copy := self._ledger.excess()) and now >= self._retry_ns:
            self._drain_chunk(copy, now)
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
        elif self.requests:
            if not self._request_chunk(self.requests[0]):
                self._finish(self.requests.popleft())
        else:
            return False
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

    def _drain_chunk(self, copy: Copy, now: int) -> None:
        try:
            for region in self._ledger.regions.values():
                if self._ledger.discard(region.id, copy, 0, region.pages, "failsafe") is not None:
                    return
        except OSError:
            self._retry_ns = now + RETRY_NS

    def _request_chunk(self, request: FakeRequest) -> bool:
        """False when nothing is left of it."""
        while request.left:
            copy, region_id, first, end = request.left.popleft()
            before = self._ledger.counters[f"requested-bytes-{copy}"]
            try:
                at = self._ledger.discard(region_id, copy, first, end, "requested")
            except OSError as error:
                request.error = str(error)
                return False
            if at is not None:
                now = self._ledger.counters[f"requested-bytes-{copy}"]
                request.discarded += now - before
                request.left.appendleft((copy, region_id, at, end))
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
