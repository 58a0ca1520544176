# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator against the rest of qmp-upm: the plugin's rules, and a session's decisions."""

import asyncio
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_upm.pages import PAGE_BYTES, PageSet
from qmp_upm.policy import Batch, Decision, LedgerView, Policy, Pressure, make_policy
from qmp_upm.protocol import Copy
from qmp_upm.records import make_records
from qmp_upm.simulator.engine import Replay
from qmp_upm.simulator.machine import Machine
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.testing import FakePlugin, FakeVm
from qmp_upm.trace import Read
from tests.unit.sessions import MIB, running, until
from tests.unit.virtualtime import VirtualLoop, run_in_virtual_time

REGION_PAGES = 4096

Act = tuple[str, int, int, bool]
acts = st.lists(
    st.tuples(
        st.sampled_from(["convert", "convert", "convert", "modes", "discard"]),
        st.integers(0, 40),
        st.sampled_from([1, 2, 5, 20, 600, 1100]),
        st.booleans(),
    ),
    max_size=40,
)


class States:
    """What the guest's pages are. It makes none what it is: the simulator knows no such thing."""

    def __init__(self) -> None:
        self._private = np.zeros(REGION_PAGES, dtype=bool)

    def change(self, first: int, pages: int, *, private: bool) -> int:
        """The pages from ``first`` on, ``pages`` at most, that this changes; it changes them."""
        other = np.flatnonzero(self._private[first : first + pages] == private)
        changed = int(other[0]) if len(other) else min(pages, REGION_PAGES - first)
        self._private[first : first + changed] = private
        return changed


def both(plugin: FakePlugin, name: str) -> int:
    """A counter of the plugin, of both copies, in pages."""
    return sum(plugin.ledger.counters[f"{name}-bytes-{copy}"] for copy in Copy) // PAGE_BYTES


@given(script=acts, budget=st.sampled_from([0, 3, 40, 700, 1 << 20]))
@settings(max_examples=150, deadline=None)
def test_machine_counts_as_the_plugin_does(script: list[Act], budget: int) -> None:
    """Conversions, modes and discards in any order: the same deferred, reused and discarded bytes.

    The plugin here is the one of qmp_upm.testing, which is checked against the real one.
    """
    states = States()
    script = [
        (what, first, states.change(10 * first, pages, private=flag), flag)
        if what == "convert"
        else (what, first, pages, flag)
        for what, first, pages, flag in script
    ]
    rows = [
        (1, 10 * first * PAGE_BYTES, pages * PAGE_BYTES, int(private), 0, 0, 1)
        for what, first, pages, private in script
        if what == "convert" and pages
    ]
    if not rows:
        return
    machine = Machine(Timeline(make_records(rows)), budget * PAGE_BYTES)
    plugin = FakePlugin({"ram": REGION_PAGES * PAGE_BYTES}, clock_ns=lambda: 0)
    plugin.ledger.budget = budget * PAGE_BYTES
    at = 0
    for what, first, pages, flag in script:
        if what == "convert":
            if not pages:
                continue
            offset, size = 10 * first * PAGE_BYTES, pages * PAGE_BYTES
            plugin.convert(1, offset, size, to_private=flag)
            machine.convert(at, at + 1)
            at += 1
        elif what == "modes":
            copy = Copy.PRIVATE if flag else Copy.SHARED
            machine.deferred ^= {copy}
            plugin.ledger.deferring[copy] = not plugin.ledger.deferring[copy]
        else:
            _discard_all(machine, plugin, Copy.PRIVATE if flag else Copy.SHARED)
    account, ledger = machine.account, plugin.ledger
    assert machine.stale_pages == ledger.stale_pages
    assert account.peak_pages == ledger.peak_pages
    assert account.deferred_pages == both(plugin, "deferred")
    assert account.reused_pages == both(plugin, "reused")
    assert account.inline_pages == both(plugin, "inline")
    assert account.superseded_pages == 0
    assert account.requested_pages == both(plugin, "requested")
    assert account.inline_calls + account.requested_calls == ledger.counters["discards"]


def _discard_all(machine: Machine, plugin: FakePlugin, copy: Copy) -> None:
    """Everything that is stale of a copy, by request."""
    machine.discard(PageSet({1: plugin.ledger.regions[1].stale[copy].copy()}))
    at = 0
    while step := plugin.ledger.discard(1, copy, at, REGION_PAGES, "requested"):
        at = step.end


class Listener(Policy):
    """Passes everything on to a policy, and remembers what was asked and decided."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.parameters)
        self.policy = policy
        self.asked: list[tuple[Batch, int]] = []
        self.decided: list[tuple[Any, ...]] = []

    def decide(self, batch: Batch, ledger: LedgerView, now_ns: int, pressure: Pressure) -> Decision:
        """As the policy does."""
        decision = self.policy.decide(batch, ledger, now_ns, pressure)
        self.asked.append((batch, now_ns))
        discards = [(d.copy, d.reason, tuple(d.pages.ranges())) for d in decision.discards]
        self.decided.append((decision.defer, decision.hold_bytes, decision.wake_at_ns, discards))
        return decision


PRICES = {"conversion": 2e-6, "discard_call": 5e-6, "discard_page": 1e-6, "refault_page": 2e-6}


async def live(folder: Path, listener: Listener, rng: random.Random) -> None:
    """A session decides by this policy over a VM whose guest converts at random, then is quiet."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    plugin = FakePlugin({"ram": REGION_PAGES * PAGE_BYTES}, clock_ns=loop.monotonic_ns)
    async with (
        FakeVm(plugin).listening(folder / "sock"),
        running(folder, loop.clock, lease="3 s", budget="8 MiB") as one,
    ):
        one.session.guest.policy._policy = listener
        await until(lambda: one.session.state == "attached")
        recorded, states = one.session.guest.batches.subscribe(), States()
        for _ in range(150):
            for _ in range(rng.randrange(40)):
                first, pages = rng.randrange(REGION_PAGES - 8), rng.choice([8, 64])
                private = rng.random() < 0.5
                size = states.change(first, pages, private=private) * PAGE_BYTES
                if size:
                    plugin.convert(1, first * PAGE_BYTES, size, to_private=private)
            await asyncio.sleep(rng.choice([0.001, 0.01, 0.1, 1.0]))
        await asyncio.sleep(60)
        asked = [(len(batch), now_ns) for batch, now_ns in listener.asked if len(batch)]
        blocks = [await anext(recorded) for _ in asked]
    assert [(len(block.records), block.now_ns) for block in blocks] == asked


@pytest.mark.parametrize(
    ("name", "parameters", "reasons"),
    [
        ("eager", {"copies": "shared"}, set()),
        ("batched", {"max_bytes": "256 KiB", "max_delay": "0.2 s"}, {"bytes", "delay"}),
        ("lazy", {"max_age": "2 s", "high": 0.2, "low": 0.1}, {"age", "budget"}),
        ("adaptive", {"prices": PRICES}, {"learnt", "at-once", "budget"}),
    ],
)
@pytest.mark.parametrize("seed", [5, 6])
def test_live_and_simulated_decisions_are_the_same(
    tmp_path: Path, name: str, parameters: dict[str, Any], reasons: set[str], seed: int
) -> None:
    """A session decides over its VM; the simulator, given what the guest did, decides alike."""
    listener = Listener(make_policy(name, parameters))
    run_in_virtual_time(live(tmp_path, listener, random.Random(seed)))  # noqa: S311
    records = np.concatenate([batch.records for batch, _ in listener.asked])
    again = Listener(make_policy(name, parameters))
    run = Replay(Timeline(records), again, 8 * MIB)
    for batch, now_ns in listener.asked[1:]:
        run.read(Read(run.at + len(batch), now_ns, batch.dropped))
    assert again.decided == listener.decided
    assert {reason for _, _, _, gone in again.decided for _, reason, _ in gone} == reasons
