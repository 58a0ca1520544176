# SPDX-License-Identifier: GPL-2.0-or-later
"""The fake plugin of qmp_upm.testing against the real one: same commands, same answers."""

import asyncio
import itertools
import json
import random
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from qmp_upm.testing import FakePlugin, ReplyError
from tests.integration.guest import MEMFD, MIB, PAGE, Guest, has_guest_memfd

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-system-x86_64") and has_guest_memfd()),
    reason="needs QEMU, and /dev/kvm with guest_memfd for any VM (Linux 6.18)",
)

STEPS = 400
BASE = 64 * MIB
WINDOW_PAGES = 64


class Both:
    """A real plugin and a fake one that are told the same."""

    def __init__(self, real: Guest) -> None:
        self.real = real
        self.fake = FakePlugin({"ram": 256 * MIB})
        self.fake("x-upm-configure", {"private": "defer", "shared": "defer", "budget": 1 << 40})
        self.events: list[Any] = []

    def cmd(self, name: str, **arguments: Any) -> tuple[Any, Any]:
        """What each answers, an error as its text."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            real = self.real.cmd(name, **arguments)
        except ExecuteError as error:
            real = str(error)
        try:
            fake = self.fake(name, arguments)
        except ReplyError as error:
            fake = error.description
        return real, fake

    def convert(self, page: int, pages: int, *, private: bool) -> None:
        """The same conversion in both."""
        offset, size = BASE + page * PAGE, pages * PAGE
        assert self.real.convert(offset, size, private=private) == 0
        self.fake.convert(1, offset, size, to_private=private)

    def settle(self) -> None:
        """Let both workers finish, and keep the fake's events."""
        while self.fake.worker.step():
            pass
        self.events += self.fake.worker.events
        self.fake.worker.events.clear()
        end = time.monotonic() + 20
        while (pair := self.queries())[0] != pair[1]:
            assert time.monotonic() < end, pair
            time.sleep(0.001)

    def query(self) -> Any:
        """The fake's."""
        return self.fake("x-upm-query", {})

    def queries(self) -> tuple[Any, Any]:
        """Both, without what depends on time (events of the budget too) and on who asked."""
        pair = self.real.cmd("x-upm-query"), self.query()
        for answer in pair:
            del answer["lease"]["remaining-ms"]
            del answer["counters"]["commands"], answer["counters"]["events"]
            for name, buckets in answer["latency-ns"].items():
                answer["latency-ns"][name] = sum(buckets)
            answer["regions"] = [region for region in answer["regions"] if region["id"] == 1]
            answer["regions"][0]["name"] = "ram"
            answer["regions"][0]["slots"] = [answer["regions"][0]["slots"][0]]
            del answer["regions"][0]["slots"][0]["size"]
        return pair


@pytest.fixture
def loop() -> Iterator[None]:
    """The monitor of the real one works on the thread's event loop."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    loop.close()
    asyncio.set_event_loop(None)


@pytest.fixture
def both(loop: None, tmp_path: Path) -> Iterator[Both]:  # noqa: ARG001 - there while they are
    """Both, while their guests run."""
    real = Guest(tmp_path, *MEMFD)
    yield Both(real)
    real.close()


@pytest.fixture
def launching(loop: None, tmp_path: Path) -> Iterator[Both]:  # noqa: ARG001 - there while they are
    """Both, before their guests run."""
    real = Guest(tmp_path, *MEMFD, launched=False)
    both = Both(real)
    both.fake.ledger.launching = True
    yield both
    real.close()


def shape(value: Any) -> Any:
    """Keys and types; lists by their first element. QEMU gives no order to keys."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return type(value).__name__


def test_answers_have_the_same_shape(both: Both) -> None:
    """The same keys, and values of the same types, for every command."""
    both.convert(0, 4, private=True)
    both.convert(2, 4, private=False)
    for name, arguments in (
        ("x-upm-query", {}),
        ("x-upm-configure", {"private": "defer"}),
        ("x-upm-read", {"cursor": 0, "max": 10}),
        ("x-upm-stale", {"copy": "shared", "region": 1, "cursor": 0, "max": 10}),
        ("x-upm-discard", {"id": 1, "copy": "both", "all": True}),
    ):
        real, fake = both.cmd(name, **arguments)
        assert shape(fake) == shape(real), name


BAD: list[tuple[str, dict[str, Any]]] = [
    ("x-upm-query", {"x": 1}),
    ("x-upm-configure", {"privat": "defer"}),
    ("x-upm-configure", {"private": "lazy"}),
    ("x-upm-configure", {"budget": -1}),
    ("x-upm-configure", {"lease-ms": "5"}),
    ("x-upm-configure", {"on-lease-expiry": "never"}),
    ("x-upm-read", {"cursor": 0}),
    ("x-upm-read", {"cursor": 1 << 40, "max": 1}),
    ("x-upm-read", {"cursor": 0, "max": 0}),
    ("x-upm-stale", {"copy": "both", "region": 1, "cursor": 0, "max": 1}),
    ("x-upm-stale", {"copy": "private", "region": 99, "cursor": 0, "max": 1}),
    ("x-upm-discard", {"id": 1, "copy": "both"}),
    ("x-upm-discard", {"id": 1, "copy": "both", "all": False}),
    ("x-upm-discard", {"id": 1, "copy": "both", "ranges": []}),
    ("x-upm-discard", {"id": 1, "copy": "both", "ranges": [[99, 0, 4096]]}),
    ("x-upm-discard", {"id": 1, "copy": "both", "ranges": [[1, 1, 4096]]}),
    ("x-upm-discard", {"id": 1, "copy": "both", "ranges": [[1, 0, 4096, 0]]}),
    ("x-upm-discard", {"id": 1, "copy": "both", "ranges": [[1, 256 * MIB, 4096]]}),
]


def test_refusals_are_the_same(both: Both) -> None:
    """Each malformed command is refused with the same words."""
    for name, arguments in BAD:
        real, fake = both.cmd(name, **arguments)
        assert isinstance(real, str), (name, arguments)
        assert fake == real


def step(both: Both, choose: random.Random, ids: Iterator[int], cursor: int) -> int:
    """One thing that guest or daemon do, at random; returns the cursor to read on from."""
    page = choose.randrange(WINDOW_PAGES)
    pages = choose.randint(1, WINDOW_PAGES - page)
    action = choose.random()
    if action < 0.6:
        both.convert(page, pages, private=choose.random() < 0.5)
    elif action < 0.7:
        modes = {copy: choose.choice(["eager", "defer"]) for copy in ("private", "shared")}
        budget = choose.choice([0, 20 * PAGE, 60 * PAGE, 1 << 40])
        assert both.cmd("x-upm-configure", **modes, budget=budget) == ({}, {})
        both.settle()
    elif action < 0.85:
        copy = choose.choice(["private", "shared", "both"])
        ranges = [[1, BASE + page * PAGE, pages * PAGE], [1, BASE, 4 * PAGE]]
        both.cmd("x-upm-discard", id=next(ids), copy=copy, ranges=ranges)
        both.settle()
    else:
        real, fake = both.cmd("x-upm-read", cursor=cursor, max=choose.randint(1, 8))
        for answer in real, fake:
            for record in answer["records"]:
                record[5] = 0
        assert fake == real
        return int(real["cursor"])
    return cursor


@pytest.mark.parametrize("seed", range(3))
def test_ledgers_agree(both: Both, seed: int) -> None:
    """Random conversions, modes, budgets, discards and reads: the same ledger at every step."""
    choose, ids, cursor = random.Random(seed), itertools.count(1), 0  # noqa: S311 - repeatable
    for _ in range(STEPS):
        cursor = step(both, choose, ids, cursor)
        real, fake = both.queries()
        assert fake == real
        if choose.random() < 0.2:
            copy = choose.choice(["private", "shared"])
            real, fake = both.cmd("x-upm-stale", copy=copy, region=1, cursor=0, max=5)
            assert fake == real


def test_launches_are_alike(launching: Both) -> None:
    """No conversion is counted, a request waits; once the guest runs, both go on from there."""
    both = launching
    both.convert(0, 32, private=True)
    both.convert(8, 16, private=False)
    assert both.cmd("x-upm-discard", id=1, copy="both", all=True) == ({"queued": 1},) * 2
    real, fake = both.queries()
    assert fake == real
    assert (fake["launching"], fake["records"]["head"], fake["stale"]["peak"]) == (True, 0, 0)
    assert both.fake.worker.due_ns() is None
    both.real.launch()
    both.fake.ledger.launching = False
    both.settle()
    both.convert(0, 32, private=True)
    assert [data["id"] for _, data in both.events] == [1]
    real, fake = both.queries()
    assert fake == real
    assert fake["counters"]["deferred-bytes-shared"] == 16 * PAGE


def test_long_discards_go_in_chunks(both: Both) -> None:
    """Many chunks, one event, and the same numbers."""
    both.convert(0, 5000, private=True)
    both.cmd("x-upm-discard", id=7, copy="both", ranges=[[1, BASE, 6000 * PAGE]])
    both.settle()
    real, fake = both.queries()
    assert fake == real
    assert fake["counters"]["discards"] == 10
    assert both.events == [
        (
            "X_UPM_DISCARDED",
            {"id": 7, "discarded": 5000 * PAGE, "skipped": 7000 * PAGE, "error": None},
        )
    ]


def test_records_are_dropped_alike(both: Both, tmp_path: Path) -> None:
    """A reader that is too slow loses the same records."""
    pages = range(0, 2 * 16384 + 6, 2)
    commands = [b'{"execute": "qmp_capabilities"}']
    for page in pages:
        arguments = {"gpa": BASE + page * PAGE, "size": PAGE, "private": True}
        commands.append(json.dumps({"execute": "x-test-convert", "arguments": arguments}).encode())
        both.fake.convert(1, BASE + page * PAGE, PAGE, to_private=True)
    with socket.socket(socket.AF_UNIX) as second, second.makefile("rb") as replies:
        second.connect(str(tmp_path / "second"))
        replies.readline()
        for command in commands:
            second.sendall(command)
            replies.readline()
    real, fake = both.cmd("x-upm-read", cursor=0, max=3)
    for answer in real, fake:
        for record in answer["records"]:
            record[5] = 0
    assert fake == real
    assert fake["dropped"] == 3
