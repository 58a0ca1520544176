# SPDX-License-Identifier: GPL-2.0-or-later
"""The fakes that we give to others: wire, faults, and the plugin on a clock of the test's."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qmp_upm.testing
from qmp_upm.protocol import Copy, Query, read_message
from qmp_upm.qmp import Monitor
from qmp_upm.testing import (
    Close,
    Delay,
    Drop,
    FakePlugin,
    FakeQemu,
    FakeVm,
    Flood,
    Garbage,
    GiantLine,
    ReplyError,
    Script,
    Split,
)

PAGE = 4096
MSEC = 1_000_000
MIB = 1 << 20


class Clock:
    """Nanoseconds that pass when told."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def __call__(self) -> int:
        """Now."""
        return self.ns

    def advance_ms(self, ms: int) -> None:
        """Let time pass."""
        self.ns += ms * 1_000_000


@pytest.fixture
def clock() -> Clock:
    """One for the plugin."""
    return Clock()


@pytest.fixture
def plugin(clock: Clock) -> FakePlugin:
    """A plugin that defers both copies."""
    made = FakePlugin({"ram": 64 * MIB}, clock_ns=clock)
    made("x-upm-configure", {"private": "defer", "shared": "defer", "budget": 1 << 30})
    return made


def work(plugin: FakePlugin) -> list[tuple[str, dict[str, Any]]]:
    """Lets the plugin's thread do all that is due; its events."""
    while plugin.worker.step():
        pass
    events = list(plugin.worker.events)
    plugin.worker.events.clear()
    return events


def test_public_names() -> None:
    """What the package shows is there, and in order."""
    assert all(hasattr(qmp_upm.testing, name) for name in qmp_upm.testing.__all__)
    assert sorted(qmp_upm.testing.__all__) == qmp_upm.testing.__all__


def test_lease_runs_out(plugin: FakePlugin, clock: Clock) -> None:
    """Without a command both modes go to eager, and the ledger empties."""
    plugin("x-upm-configure", {"lease-ms": 50})
    plugin.convert(1, 0, MIB, to_private=True)
    clock.advance_ms(49)
    plugin("x-upm-read", {"cursor": 0, "max": 1})
    clock.advance_ms(49)
    assert work(plugin) == []
    clock.advance_ms(1)
    assert work(plugin) == [("X_UPM_LEASE_EXPIRED", {"stale": MIB})]
    assert (plugin.ledger.stale(Copy.SHARED), plugin.ledger.counters["failsafe-bytes-shared"]) == (
        0,
        MIB,
    )
    assert plugin.worker.due_ns() is None


def test_bell_rings_once_until_read(plugin: FakePlugin, clock: Clock) -> None:
    """At most one event per notify-ms, and the next only after a read."""
    plugin("x-upm-configure", {"notify-ms": 20})
    bell = ("X_UPM_CONVERSIONS", {"cursor": 1, "dropped": 0})
    plugin.convert(1, 0, PAGE, to_private=True)
    assert work(plugin) == [bell]
    plugin.convert(1, MIB, PAGE, to_private=True)
    clock.advance_ms(100)
    assert work(plugin) == []
    plugin("x-upm-read", {"cursor": 0, "max": 1})
    assert work(plugin) == [("X_UPM_CONVERSIONS", {"cursor": 2, "dropped": 0})]


def test_failing_discard_is_said_and_kept(plugin: FakePlugin) -> None:
    """The copy stays in the ledger, the event has the reason."""
    plugin.convert(1, 0, MIB, to_private=True)
    plugin.ledger.failing = "Input/output error"
    plugin("x-upm-discard", {"id": 3, "copy": "shared", "all": True})
    ((_, data),) = work(plugin)
    assert (data["error"], data["discarded"]) == ("Input/output error", 0)
    assert plugin.ledger.stale(Copy.SHARED) == MIB


def test_failing_discards_hold_up_nobody(plugin: FakePlugin, clock: Clock) -> None:
    """After eight of them the region is QEMU's own, until one succeeds; the drain tries again."""
    for page in range(0, 20, 2):
        plugin.convert(1, page * PAGE, PAGE, to_private=True)
    plugin.ledger.failing = "Input/output error"
    plugin("x-upm-discard", {"id": 3, "copy": "shared", "all": True})
    ((_, data),) = work(plugin)
    assert (data["error"], plugin.ledger.counters["failed-discards"]) == ("Input/output error", 10)
    query: Any = plugin("x-upm-query", {})
    assert query["regions"][0]["state"] == "failing"
    plugin.convert(1, MIB, PAGE, to_private=True)
    assert plugin.ledger.stale(Copy.SHARED) == 10 * PAGE
    plugin("x-upm-configure", {"shared": "eager"})
    work(plugin)
    assert plugin.worker.due_ns() == clock() + 100 * MSEC
    plugin.ledger.failing = None
    clock.advance_ms(100)
    work(plugin)
    query = plugin("x-upm-query", {})
    assert (query["regions"][0]["state"], query["stale"]["shared"]) == ("followed", 0)


def test_nothing_is_discarded_in_a_launch(plugin: FakePlugin, clock: Clock) -> None:
    """What is converted is the state to begin with; requests and the lease's drain wait."""
    plugin.convert(1, 0, MIB, to_private=True)
    plugin.ledger.launching = True
    plugin.convert(1, MIB, MIB, to_private=True)
    plugin("x-upm-configure", {"lease-ms": 50})
    plugin("x-upm-discard", {"id": 3, "copy": "shared", "all": True})
    clock.advance_ms(50)
    assert work(plugin) == [("X_UPM_LEASE_EXPIRED", {"stale": MIB})]
    for _ in range(15):
        plugin("x-upm-discard", {"id": 4, "copy": "shared", "all": True})
    with pytest.raises(ReplyError, match="busy: the VM is being launched"):
        plugin("x-upm-discard", {"id": 4, "copy": "shared", "all": True})
    assert plugin.ledger.stale(Copy.SHARED) == MIB
    plugin.ledger.launching = False
    work(plugin)
    assert plugin.ledger.stale(Copy.SHARED) == 0
    assert plugin.ledger.counters["conversions-to-private"] == 1


def test_closed_region_takes_its_copies_along(plugin: FakePlugin) -> None:
    """They count as forgotten, and a request for them ends."""
    plugin.convert(1, 0, MIB, to_private=True)
    plugin("x-upm-discard", {"id": 3, "copy": "shared", "all": True})
    plugin.ledger.close_region(1)
    assert [data["discarded"] for _, data in work(plugin)] == [0]
    assert plugin.ledger.counters["forgotten-bytes-shared"] == MIB
    with pytest.raises(ReplyError, match="not found"):
        plugin("x-upm-stale", {"copy": "shared", "region": 1, "cursor": 0, "max": 1})


RUNS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 8), st.integers(1, 3), st.booleans()), max_size=30
)


@given(runs=RUNS, budget_pages=st.integers(0, 80), deferring=st.sets(st.sampled_from(list(Copy))))
def test_runs_are_their_single_conversions(
    runs: list[tuple[int, int, int, bool]], budget_pages: int, deferring: set[Copy]
) -> None:
    """One call that stands for many conversions leaves what the many leave; the books close."""
    modes = {copy.value: "defer" if copy in deferring else "eager" for copy in Copy}
    at_once, singly = (FakePlugin({"ram": MIB}, clock_ns=lambda: 5) for _ in range(2))
    for plugin in at_once, singly:
        plugin("x-upm-configure", modes | {"budget": budget_pages * PAGE})
    for first, count, pages, private in runs:
        at, size = first * PAGE, pages * PAGE
        at_once.convert(1, at, count * size, to_private=private, count=count)
        for i in range(count):
            singly.convert(1, at + i * size, size, to_private=private)
    queries = [plugin("x-upm-query", {}) for plugin in (at_once, singly)]
    assert queries[0] == queries[1]
    reads = [plugin("x-upm-read", {"cursor": 0, "max": 999}) for plugin in (at_once, singly)]
    assert reads[0] == reads[1]
    n = at_once.ledger.counters
    for copy in Copy:
        gone = ("reused", "requested", "failsafe", "forgotten")
        left = sum(n[f"{why}-bytes-{copy}"] for why in gone) + at_once.ledger.stale(copy)
        assert n[f"deferred-bytes-{copy}"] == left


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[FakeQemu]:
    """A monitor that answers with what it was asked."""
    plan = Script()
    fake = FakeQemu(lambda command, arguments: [command, arguments], plan)
    async with fake.listening(tmp_path / "sock"):
        yield fake


@pytest.fixture
async def wire(
    tmp_path: Path, peer: FakeQemu
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare client of it, past the greeting."""
    assert peer.connections == 0
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "sock"))
    assert b"QMP" in await reader.readline()
    writer.write(b'{"execute": "qmp_capabilities"}')
    assert json.loads(await reader.readline()) == {"return": {}}
    yield reader, writer
    writer.close()
    await writer.wait_closed()


Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def test_answers_and_scripted_replies(peer: FakeQemu, wire: Wire) -> None:
    """Scripted replies first, once each; then the handler; ids come back."""
    reader, writer = wire
    peer.replies["a"] += [{"scripted": 1}, ReplyError("no", kind="DeviceNotFound")]
    writer.write(
        b'{"execute": "a", "id": 1}{"execute": "a"}{"exec-oob": "a", "arguments": {"x": 1}}'
    )
    assert json.loads(await reader.readline()) == {"return": {"scripted": 1}, "id": 1}
    assert json.loads(await reader.readline()) == {
        "error": {"class": "DeviceNotFound", "desc": "no"}
    }
    assert json.loads(await reader.readline()) == {"return": ["a", {"x": 1}]}
    assert peer.counts["a"] == 3


async def test_malformed_commands_are_refused(peer: FakeQemu, wire: Wire) -> None:
    """It is a peer for clients under test: what they send wrong is an error, and no more."""
    reader, writer = wire
    for text in (b"{'a'}", b"[]", b'{"execute": 1}', b"xyz\n"):
        writer.write(text)
        assert "error" in json.loads(await reader.readline())
    assert peer.connections == 1


async def test_second_client_is_not_greeted(tmp_path: Path, peer: FakeQemu, wire: Wire) -> None:
    """Until the first one leaves, as QEMU does it."""
    _, writer = wire
    other, theirs = await asyncio.open_unix_connection(str(tmp_path / "sock"))
    writer.write(b'{"execute": "a"}')
    await wire[0].readline()
    assert peer.connections == 1
    writer.close()
    assert b"QMP" in await other.readline()
    theirs.close()
    await theirs.wait_closed()


FAULTS = {
    "delay": (Delay(0.001), b'{"return": ["a", {}]}\r\n'),
    "drop": (Drop(), b""),
    "garbage": (Garbage(b"\xff\x00\n"), b"\xff\x00\n"),
    "split": (Split(3), b'{"return": ["a", {}]}\r\n'),
    "giant": (GiantLine(100_000), b'{"return": "' + b"x" * 100_000 + b'"}\r\n'),
    "endless": (GiantLine(10, ended=False), b'{"return": "xxxxxxxxxx'),
    "flood": (Flood(20_000, b"{}\n"), b"{}\n" * 20_000 + b'{"return": ["a", {}]}\r\n'),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_faults(peer: FakeQemu, wire: Wire, name: str) -> None:
    """Each does to one reply what it says; the one behind it comes whole, and in its turn."""
    reader, writer = wire
    fault, expected = FAULTS[name]
    assert isinstance(peer.plan, Script)
    peer.plan.add("a", fault)
    writer.write(b'{"execute": "a"}{"execute": "b"}')
    expected += b'{"return": ["b", {}]}\r\n'
    assert await reader.readexactly(len(expected)) == expected


async def test_close_in_mid_reply(peer: FakeQemu, wire: Wire) -> None:
    """A part, and the end; the next client is served."""
    reader, writer = wire
    assert isinstance(peer.plan, Script)
    peer.plan.add("a", Close(after=7))
    writer.write(b'{"execute": "a"}')
    assert await reader.read() == b'{"retur'


async def test_vm_serves_a_monitor(tmp_path: Path) -> None:
    """Our own client gets a query that our own model understands, and the plugin's events."""
    plugin = FakePlugin({"ram": MIB})
    async with FakeVm(plugin).listening(tmp_path / "sock"):
        monitor = Monitor(str(tmp_path / "sock"))
        await monitor.connect()
        await monitor.execute("x-upm-configure", {"notify-ms": 1, "lease-ms": 50})
        plugin.convert(1, 0, PAGE, to_private=True)
        (event,) = await monitor.wait_events(20)
        assert event.event == "X_UPM_CONVERSIONS"
        assert read_message(Query, await monitor.execute("x-upm-query")).records.head == 1
        assert [e.event for e in await monitor.wait_events(20)] == ["X_UPM_LEASE_EXPIRED"]
        await monitor.close()
