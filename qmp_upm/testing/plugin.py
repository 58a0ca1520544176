# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin's five commands on a model of its ledger, answered as plugin/commands.c does."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from qmp_upm import __version__
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.protocol import COMMANDS, PROTOCOL, RING_RECORDS, Copy
from qmp_upm.testing.ledger import FakeLedger, FakeRegion
from qmp_upm.testing.peer import ReplyError
from qmp_upm.testing.ring import FakeRing
from qmp_upm.testing.worker import MSEC, FakeRequest, FakeWorker

REQUESTS_MOST = 16
STALE_MOST = 16384
RANGES_MOST = 16384
MS_MOST = 24 * 3600 * 1000
INT_MOST = (1 << 63) - 1
_MODES = ("eager", "defer")
_EXPIRY = ("eager", "keep")

Arguments = Mapping[str, Any]


class FakePlugin:
    """A VM's plugin: call it with a command and its arguments. Raises ReplyError as it would.

    ``regions``: bytes of guest RAM by the name of its backing; they are numbered from 1. The guest
    converts by ``convert``; ``ledger`` and ``worker`` are there to look at and to break.
    """

    def __init__(
        self,
        regions: Mapping[str, int],
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        ring_records: int = RING_RECORDS,
    ) -> None:
        self.clock_ns = clock_ns
        self.ledger = FakeLedger(regions, FakeRing(ring_records), clock_ns)
        self.worker = FakeWorker(self.ledger, clock_ns)
        self.convert = self.ledger.convert

    def __call__(self, command: str, arguments: Arguments) -> object:
        """The command's return value."""
        if command not in COMMANDS:
            raise ReplyError(f"The command {command} has not been found", kind="CommandNotFound")
        answer: Callable[[Arguments], object] = getattr(self, f"_{command[6:]}")
        return answer(arguments)

    def _count_command(self) -> None:
        self.ledger.counters["commands"] += 1
        self.worker.renew_lease()

    def _query(self, arguments: Arguments) -> object:
        _only(arguments)
        ledger, ring = self.ledger, self.ledger.ring
        ledger.counters["commands"] += 1
        return {
            "version": __version__,
            "protocol": PROTOCOL,
            "vm-kind": "sw-protected" if ledger.regions else "none",
            "launching": ledger.launching,
            "conversion": "two-copy" if ledger.regions else "none",
            "page-size": PAGE_BYTES,
            "regions": [_region(region) for region in ledger.regions.values()],
            "modes": {copy.value: _MODES[ledger.deferring[copy]] for copy in Copy},
            "budget": ledger.budget,
            "notify-ms": self.worker.notify_ms,
            "lease": self._lease(),
            "stale": {copy.value: ledger.stale(copy) for copy in Copy}
            | {"peak": ledger.peak_pages * PAGE_BYTES},
            "records": {"head": ring.head, "oldest": ring.oldest, "dropped": ring.dropped},
            "counters": dict(ledger.counters),
            "latency-ns": {name: list(buckets) for name, buckets in ledger.latency_ns.items()},
        }

    def _lease(self) -> dict[str, object]:
        worker = self.worker
        return {
            "ms": worker.lease_ms,
            "remaining-ms": max(0, worker.lease_deadline_ns - self.clock_ns()) // MSEC,
            "on-expiry": "keep" if worker.keep_on_expiry else "eager",
            "expired": worker.lease_expired,
        }

    def _configure(self, arguments: Arguments) -> object:
        _only(arguments, "private", "shared", "budget", "lease-ms", "on-lease-expiry", "notify-ms")
        for copy in Copy:
            if copy in arguments:
                _choice(arguments, copy, _MODES)
        if "on-lease-expiry" in arguments:
            _choice(arguments, "on-lease-expiry", _EXPIRY)
        for name, most in ("budget", INT_MOST), ("lease-ms", MS_MOST), ("notify-ms", MS_MOST):
            if name in arguments:
                _integer(arguments, name, 0, most)
        ledger, worker = self.ledger, self.worker
        for copy in Copy:
            if copy in arguments:
                ledger.deferring[copy] = arguments[copy] == "defer"
        if "on-lease-expiry" in arguments:
            worker.keep_on_expiry = arguments["on-lease-expiry"] == "keep"
        ledger.budget = arguments.get("budget", ledger.budget)
        worker.lease_ms = arguments.get("lease-ms", worker.lease_ms)
        worker.notify_ms = arguments.get("notify-ms", worker.notify_ms)
        worker.arm()
        self._count_command()
        return {}

    def _read(self, arguments: Arguments) -> object:
        _only(arguments, "cursor", "max")
        cursor = _integer(arguments, "cursor", 0, INT_MOST)
        most = _integer(arguments, "max", 1, RING_RECORDS)
        if cursor > self.ledger.ring.head:
            raise ReplyError("Parameter 'cursor' is beyond the newest record")
        records, cursor, lost = self.ledger.ring.read(cursor, most)
        self.worker.after_read(more=cursor < self.ledger.ring.head)
        self._count_command()
        return {"cursor": cursor, "dropped": lost, "records": records}

    def _stale(self, arguments: Arguments) -> object:
        _only(arguments, "copy", "region", "cursor", "max")
        copy = Copy(_choice(arguments, "copy", tuple(Copy)))
        region = self.ledger.regions.get(_integer(arguments, "region", 1, (1 << 32) - 1))
        at = _integer(arguments, "cursor", 0, INT_MOST) // PAGE_BYTES
        most = _integer(arguments, "max", 1, STALE_MOST)
        if region is None:
            raise ReplyError(f"Region {arguments['region']} not found")
        self._count_command()
        ranges: list[list[int]] = []
        done = False
        while len(ranges) < most and not done:
            run = region.next_run(copy, at, region.pages, region.pages)
            done = run is None
            if run is not None:
                ranges.append([run[0] * PAGE_BYTES, (run[1] - run[0]) * PAGE_BYTES])
                at = run[1]
        return {"ranges": ranges, "cursor": at * PAGE_BYTES, "done": done}

    def _discard(self, arguments: Arguments) -> object:
        _only(arguments, "id", "copy", "ranges", "all")
        request_id = _integer(arguments, "id", 0, INT_MOST)
        choice = _choice(arguments, "copy", (*Copy, "both"))
        copies = tuple(copy for copy in Copy if choice in (copy, "both"))
        if arguments.get("all") is True and "ranges" not in arguments:
            whole = [(region.id, 0, region.pages) for region in self.ledger.regions.values()]
            request = FakeRequest(request_id, copies, whole, 0)
        else:
            ranges = self._ranges(arguments)
            asked = sum(end - first for _, first, end in ranges) * PAGE_BYTES * len(copies)
            request = FakeRequest(request_id, copies, ranges, asked)
        if len(self.worker.requests) == REQUESTS_MOST:
            why = "too many discards are outstanding; wait for X_UPM_DISCARDED"
            if self.ledger.launching:
                why = "the VM is being launched, and discards wait until it runs"
            raise ReplyError(f"busy: {why}")
        self.worker.requests.append(request)
        self._count_command()
        self.worker.wake()
        return {"queued": len(self.worker.requests)}

    def _ranges(self, arguments: Arguments) -> list[tuple[int, int, int]]:
        given = arguments.get("ranges")
        if "all" in arguments or not isinstance(given, list) or not 0 < len(given) <= RANGES_MOST:
            raise ReplyError(f"expects either 'ranges' (1 to {RANGES_MOST} of them) or 'all': true")
        ranges = []
        for one in given:
            if not (
                isinstance(one, list)
                and len(one) == 3  # noqa: PLR2004 - region, offset, size
                and all(type(number) is int and 0 <= number <= INT_MOST for number in one)
            ):
                raise ReplyError(
                    "Parameter 'ranges' expects arrays [region, offset, size] of integers"
                )
            region, offset, size = one
            if (offset | size) % PAGE_BYTES or not size or region >= 1 << 32:
                raise ReplyError(
                    "Parameter 'ranges' expects a region's number, and offset and size in whole "
                    f"pages of {PAGE_BYTES} bytes"
                )
            ranges.append((region, offset // PAGE_BYTES, (offset + size) // PAGE_BYTES))
        for region, first, end in ranges:
            if region not in self.ledger.regions:
                raise ReplyError("Parameter 'ranges' names a region that is not there")
            if (
                first >= self.ledger.regions[region].pages
                or end > self.ledger.regions[region].pages
            ):
                raise ReplyError("Parameter 'ranges' has a range beyond the end of its region")
        return ranges


def _region(region: FakeRegion) -> dict[str, object]:
    size = region.pages * PAGE_BYTES
    return {
        "id": region.id,
        "name": region.name,
        "size": size,
        "backing": region.backing,
        "page-size": PAGE_BYTES,
        "state": region.state,
        "slots": [{"gpa": region.gpa, "size": size, "offset": 0}],
        "stale-private": len(region.stale[Copy.PRIVATE]) * PAGE_BYTES,
        "stale-shared": len(region.stale[Copy.SHARED]) * PAGE_BYTES,
    }


def _only(arguments: Arguments, *known: str) -> None:
    for name in arguments:
        if name not in known:
            raise ReplyError(f"Parameter '{name}' is unexpected")


def _integer(arguments: Arguments, name: str, least: int, most: int) -> int:
    value = arguments.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ReplyError(f"Parameter '{name}' expects an integer from {least} to {most}")
    return value


def _choice(arguments: Arguments, name: str, choices: tuple[str, ...]) -> str:
    value = arguments.get(name)
    if value not in choices:
        expected = " or ".join(f"'{choice}'" for choice in choices)
        raise ReplyError(f"Parameter '{name}' expects {expected}")
    return str(value)
