# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever QEMU sends, its VM comes to a defined state and back, and no other VM is concerned."""

import asyncio
import itertools
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from qemu.qmp import QMPError
from qemu.qmp.message import Message as WireMessage

from qmp_upm import vm
from qmp_upm.errors import MessageError
from qmp_upm.protocol import COMMANDS, Message, Query, Read, StaleRanges, read_message
from qmp_upm.stats import State
from qmp_upm.testing import FakePlugin
from qmp_upm.testing.peer import encode
from tests.unit.fleet import MIB, PAGE, Served, running_fleet, until
from tests.unit.malformed import MATRIX, NASTY, Case, Outcome, Rewrite, mutated

HEALTHY = 50
SERVING = ("x-upm-read",)
"""Commands that an attached session gives by itself."""
MEMORY_MOST = 150 * MIB
"""What all fakes, sessions and lines of 64 MiB and more may take together."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No line for each of thousands of changes of state; the next attempt comes soon."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    monkeypatch.setattr(vm, "BACKOFF_FIRST", 0.01)
    monkeypatch.setattr(vm, "BACKOFF_MOST", 0.1)
    yield
    structlog.reset_defaults()


def give_up_after(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Who does not answer for so long is given up."""
    monkeypatch.setattr("qmp_upm.qmp.EXECUTE_SECONDS", seconds)
    monkeypatch.setattr("qmp_upm.qmp.CONNECT_SECONDS", seconds)


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def converting(served: Served, pause_s: float) -> None:
    """The guest flips eight pages for ever."""
    for i in itertools.count():
        served.vm.plugin.convert(1, 2 * (i % 8) * PAGE, PAGE, to_private=bool(i & 8))
        await asyncio.sleep(pause_s)


async def suffer(served: Served, case: Case, pause_s: float) -> bool:
    """Let the case happen once, and wait until it is over; the guest converts all the while.

    Whether the outcome is that of the matrix.
    """
    what, fault, outcome = case
    await until(lambda: served.attached, pause_s)
    served.plan.add(what, fault)
    connections = served.vm.connections
    if what not in SERVING:
        await served.vm.hang_up()
        connections += 1
    guest = asyncio.create_task(converting(served, pause_s))
    await until(lambda: not served.plan.waiting, pause_s)
    if outcome is Outcome.AGAIN:
        await until(lambda: served.vm.connections > connections, pause_s)
    await until(lambda: served.attached, pause_s)
    reads = served.reads
    await until(lambda: served.reads > reads + 1, pause_s)
    guest.cancel()
    await asyncio.gather(guest, return_exceptions=True)
    await until(lambda: served.attached and served.followed, pause_s)
    return served.vm.connections == connections + (outcome is Outcome.AGAIN)


@pytest.mark.parametrize("case", MATRIX)
async def test_matrix(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case ends in a defined state, and the VM is served again once it behaves."""
    async with running_fleet(tmp_path) as fleet:
        give_up_after(monkeypatch, 1.0)
        assert await suffer(await fleet.add("ill"), MATRIX[case], 0.005)


async def test_neighbours_lose_no_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole matrix happens at once beside fifty healthy VMs: each of them goes on, no lease
    runs out, and what all of it takes is bounded.
    """
    give_up_after(monkeypatch, 5.0)
    before = most = resident_bytes()
    policy = {"name": "batched", "max_delay": "5 ms"}
    async with running_fleet(tmp_path) as fleet:
        healthy = [
            await fleet.add(f"healthy-{i}", lease="20 s", policy=policy) for i in range(HEALTHY)
        ]
        await until(lambda: all(served.attached for served in healthy))
        guests = [asyncio.create_task(converting(served, 0.3)) for served in healthy]
        ill = [(await fleet.add(f"ill-{i}"), case) for i, case in enumerate(MATRIX.values())]
        suffering = [asyncio.create_task(suffer(*pair, 0.5)) for pair in ill]
        while not all(task.done() for task in suffering):
            most = max(most, resident_bytes())
            reads = [served.reads for served in healthy]
            await until(lambda: all(s.reads > n for s, n in zip(healthy, reads, strict=True)), 0.1)  # noqa: B023
        await asyncio.gather(*suffering)
        for guest in guests:
            guest.cancel()
        await asyncio.gather(*guests, return_exceptions=True)
        await until(lambda: all(served.followed for served in healthy))
        for served in healthy:
            assert served.counters["lease-expiries"] == 0
            assert served.discarded_bytes > 0
            assert (served.vm.connections, served.states) == (1, [State.ATTACHED])
    assert most - before < MEMORY_MOST


JSON = st.recursive(
    st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    what=st.sampled_from(["greeting", "query-commands", *sorted(COMMANDS - {"x-upm-discard"})]),
    change=st.tuples(st.sampled_from(["replace", "delete", "add"]), st.integers(0, 99), JSON),
)
def test_any_change_of_a_message(what: str, change: tuple[str, int, object]) -> None:
    """A valid message with anything somewhere in it: the VM is served on, or again."""

    async def run(folder: Path) -> None:
        async with running_fleet(folder) as fleet:
            fault = Rewrite(lambda message: mutated(message, *change))
            await suffer(await fleet.add("ill"), (what, fault, Outcome.GOES_ON), 0.005)

    with pytest.MonkeyPatch.context() as monkeypatch, TemporaryDirectory() as folder:
        give_up_after(monkeypatch, 0.3)
        asyncio.run(run(Path(folder)))


FUZZ_CASES = 6000
VALID: list[tuple[type[Message], str, dict[str, Any]]] = [
    (Query, "x-upm-query", {}),
    (Read, "x-upm-read", {"cursor": 0, "max": 10}),
    (StaleRanges, "x-upm-stale", {"copy": "shared", "region": 1, "cursor": 0, "max": 10}),
]


def test_decoder_is_fuzzed() -> None:
    """Valid lines with bytes changed, cut, doubled and swapped: a model, or an error of the kinds
    that end a session and no more.
    """
    choose = random.Random(1)  # noqa: S311 - repeatable, not secret
    plugin = FakePlugin({"ram": 16 * MIB})
    plugin("x-upm-configure", {"shared": "defer", "budget": MIB})
    for page in range(0, 12, 2):
        plugin.convert(1, page * PAGE, PAGE, to_private=True)
    lines = [(model, encode(plugin(name, arguments))) for model, name, arguments in VALID]
    good = 0
    for _ in range(FUZZ_CASES):
        model, line = choose.choice(lines)
        data = bytearray(line)
        for _ in range(choose.randint(1, 4)):
            at, end = sorted(choose.randrange(len(data) + 1) for _ in range(2))
            end = min(end, at + choose.choice([1, 2, 40]))
            data[at:end] = choose.choice(
                [
                    b"",
                    data[at:end] * 2,
                    b"0",
                    b"-",
                    b"9" * 30,
                    b'"',
                    b"[",
                    b"}",
                    b"\xff",
                    b"\x00",
                    b"1e9",
                ]
            )
        try:
            read_message(model, dict(WireMessage(bytes(data), eager=True)))
            good += 1
        except (MessageError, QMPError, ValueError, RecursionError):
            pass
    assert 0 < good < FUZZ_CASES // 2
