# SPDX-License-Identifier: GPL-2.0-or-later
"""A session with a VM that is well; `test_session_states` has the others."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from qmp_upm import contained, vm
from qmp_upm.asks import Apply, Flush, SetBudget, SetPolicy, SetShare
from qmp_upm.config import PolicyTable, VmSettings
from qmp_upm.errors import PolicyError, UnavailableError
from qmp_upm.events import HostEventName
from qmp_upm.pages import PageSet
from qmp_upm.policy import Batch, Decision, Discard, Policy, Pressure
from qmp_upm.protocol import READ_MOST, Copy
from qmp_upm.stats import State
from qmp_upm.testing import FakePlugin, FakeVm, Flood, ReplyError, Script
from qmp_upm.testing.peer import encode
from tests.unit.sessions import MIB, PAGE, fake_vm, running, until
from tests.unit.virtualtime import VirtualLoop, run_in_virtual_time

KEEP = {"name": "eager", "copies": "none"}


def flip(peer: FakeVm, pages: int = 1, at: int = 0) -> None:
    """The guest makes some pages private, which leaves their shared copies."""
    peer.plugin.convert(1, at * PAGE, pages * PAGE, to_private=True)


async def test_attaches_and_follows(tmp_path: Path) -> None:
    """It configures, reads, renews the lease by reading, and counts what the plugin counts."""
    async with fake_vm().listening(tmp_path / "sock") as peer, running(tmp_path) as run:
        await until(lambda: run.session.state is State.ATTACHED)
        flip(peer, 3)
        stats = run.session.guest.stats
        await until(lambda: stats.stale_bytes[Copy.SHARED] == 3 * PAGE)
        await until(lambda: peer.counts["x-upm-read"] > 4)
        assert not peer.plugin.worker.lease_expired
        assert '"conversions": 1' in run.lines()
    assert stats.conversions == {Copy.PRIVATE: 1, Copy.SHARED: 0}
    assert stats.deferred_bytes == 3 * PAGE


async def test_leaves_fail_safe(tmp_path: Path) -> None:
    """Cancelled, it leaves a VM that keeps nothing, and says that it has stopped."""
    async with fake_vm().listening(tmp_path / "sock") as peer:
        async with running(tmp_path, policy=KEEP) as run:
            await until(lambda: run.session.state is State.ATTACHED)
            flip(peer)
            await until(lambda: run.session.guest.stats.stale_bytes[Copy.SHARED])
        assert peer.plugin.ledger.deferring == {Copy.PRIVATE: False, Copy.SHARED: False}
        assert run.session.state is State.STOPPED
        await until(lambda: peer.plugin.ledger.stale(Copy.SHARED) == 0)


async def test_flood_of_events_costs_no_turns(tmp_path: Path) -> None:
    """Events that say nothing end in dropped events, a few turns and a resynchronisation."""
    bell = encode({"timestamp": {}, "event": "X_UPM_LEASE_EXPIRED", "data": {}})
    plan = Script()
    plan.add("x-upm-read", None, Flood(3_000, bell))
    async with fake_vm(plan).listening(tmp_path / "sock") as peer, running(tmp_path) as run:
        await until(lambda: run.session.guest.stats.lease_expiries > 0)
        await until(lambda: peer.counts["x-upm-read"] > 4)
        assert run.session.state is State.ATTACHED
        assert peer.counts["x-upm-configure"] < 1000
    told = [name for name, _ in run.told if name is HostEventName.LEASE_EXPIRED]
    assert len(told) == 1


async def test_refused_discard_is_no_break(tmp_path: Path) -> None:
    """A region that went between decision and request: said, read anew, and on with the session."""
    peer = fake_vm()
    peer.replies["x-upm-discard"].append(ReplyError("Parameter 'ranges' names no region"))
    policy = {"name": "batched", "max_delay": "1 ms"}
    async with peer.listening(tmp_path / "sock"), running(tmp_path, policy=policy) as run:
        await until(lambda: run.session.state is State.ATTACHED)
        flip(peer)
        await until(lambda: run.session.guest.stats.failed_discards == 1)
        await until(lambda: run.session.guest.stats.discards[Copy.SHARED] == {"delay": 1})
        assert (run.session.state, peer.connections) == (State.ATTACHED, 1)
        assert '"discard-refused"' in run.lines()


async def test_busy_discard_is_sent_again(tmp_path: Path) -> None:
    """A queue that others have filled is waited for."""
    peer = fake_vm()
    peer.replies["x-upm-discard"].append(ReplyError("busy: too many discards are outstanding"))
    policy = {"name": "batched", "max_delay": "1 ms"}
    async with peer.listening(tmp_path / "sock"), running(tmp_path, policy=policy) as run:
        await until(lambda: run.session.state is State.ATTACHED)
        flip(peer)
        await until(lambda: peer.counts["x-upm-discard"] == 2)
    first, second = (arguments for name, arguments in peer.asked if name == "x-upm-discard")
    assert first == second


class Raises(Policy):
    """Well at first."""

    def decide(self, batch: Batch, *_: Any) -> Decision:
        """Fails at the first conversion."""
        if len(batch):
            raise KeyError("oops")
        return Decision(frozenset(Copy))


class Loops(Raises):
    """Does not come back, and catches what it can."""

    def decide(self, batch: Batch, *rest: Any) -> Decision:
        """For ever."""
        while len(batch):
            try:
                time.sleep(0.001)
            except KeyError:
                return Decision()
        return super().decide(batch, *rest)


class Nonsense(Raises):
    """Returns what is no decision."""

    def decide(self, batch: Batch, *rest: Any) -> Any:
        """A discard of nothing that there is."""
        return Decision(discards=("all",)) if len(batch) else super().decide(batch, *rest)


class Negative(Raises):
    """Wants to hold less than nothing."""

    def decide(self, batch: Batch, *rest: Any) -> Decision:
        """Which the plugin would refuse."""
        return Decision(hold_bytes=-1) if len(batch) else super().decide(batch, *rest)


@pytest.mark.parametrize("kind", [Raises, Loops, Nonsense, Negative])
async def test_failing_policy_falls_back_to_eager(
    tmp_path: Path, kind: type[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its VM is served on, eagerly, until it gets another policy; everybody is told why."""
    monkeypatch.setattr(contained, "TICK_SECONDS", 0.005)
    async with fake_vm().listening(tmp_path / "sock") as peer, running(tmp_path) as run:
        run.session.guest.policy._policy = kind(None)
        await until(lambda: run.session.state is State.ATTACHED)
        assert peer.plugin.ledger.deferring[Copy.SHARED]
        flip(peer)
        await until(lambda: not peer.plugin.ledger.deferring[Copy.SHARED])
        assert run.session.view().fallen_back
        assert run.session.guest.stats.decision_failures == 1
        assert [n for n, _ in run.told].count(HostEventName.POLICY_FELL_BACK) == 1
        assert '"fallback"' in run.lines()
        await run.session.ask(SetPolicy(PolicyTable.model_validate(KEEP)))
        await until(lambda: peer.plugin.ledger.deferring[Copy.SHARED])
        assert run.session.view().fallen_back is None


class Heir(Raises):
    """Asks its predecessor."""

    def swapped(self, previous: Policy) -> None:
        """Refuses one of its own kind."""
        if isinstance(previous, Heir):
            raise TypeError("not again")


async def test_swap_keeps_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new policy meets what the old one kept; one that can't take over changes nothing."""
    make = PolicyTable.make
    monkeypatch.setattr(
        PolicyTable, "make", lambda self: Heir(None) if self.name == "heir" else make(self)
    )
    async with fake_vm().listening(tmp_path / "sock") as peer, running(tmp_path) as run:
        await until(lambda: run.session.state is State.ATTACHED)
        flip(peer, 2)
        await until(lambda: run.session.guest.ledger.stale_bytes == 2 * PAGE)
        await run.session.ask(SetPolicy(PolicyTable(name="heir")))
        assert run.session.guest.ledger.stale_bytes == 2 * PAGE
        assert (run.session.view().policy, peer.counts["x-upm-stale"]) == ("heir", 2)
        with pytest.raises(PolicyError):
            await run.session.ask(SetPolicy(PolicyTable(name="heir")))
        quick = PolicyTable.model_validate({"name": "batched", "max_delay": "1 ms"})
        await run.session.ask(SetPolicy(quick))
        await until(lambda: peer.plugin.ledger.stale(Copy.SHARED) == 0)
        assert [data["policy"] for n, data in run.told if n is HostEventName.POLICY_CHANGED] == [
            "heir",
            "batched",
        ]


async def test_budget_by_command_and_back(tmp_path: Path) -> None:
    """The plugin has it at once; a change of the configuration's own budget undoes it."""
    async with (
        fake_vm().listening(tmp_path / "sock") as peer,
        running(tmp_path, policy=KEEP, budget="1 MiB") as run,
    ):
        await until(lambda: run.session.state is State.ATTACHED)
        flip(peer, 16)
        await run.session.ask(SetBudget(8 * PAGE))
        assert peer.plugin.ledger.budget == run.session.view().budget_bytes == 8 * PAGE
        await until(lambda: peer.plugin.ledger.stale(Copy.SHARED) <= 8 * PAGE)
        await run.session.ask(SetBudget(None))
        assert peer.plugin.ledger.budget == MIB
        await run.session.ask(SetBudget(8 * PAGE))
        settings = run.session.guest.settings.model_copy(update={"budget": 2 * MIB})
        await run.session.ask(Apply(settings))
        assert peer.plugin.ledger.budget == 2 * MIB


async def test_share_is_answered_when_it_is_kept(tmp_path: Path) -> None:
    """The answer to a smaller part of the host's budget comes when no more than that is held."""
    async with (
        fake_vm().listening(tmp_path / "sock") as peer,
        running(tmp_path, policy=KEEP) as run,
    ):
        await until(lambda: run.session.state is State.ATTACHED)
        flip(peer, 4096)
        assert await run.session.ask(SetShare(64 * PAGE)) <= 64 * PAGE
        assert peer.plugin.ledger.stale(Copy.SHARED) <= 64 * PAGE


async def test_flush_gives_back_and_counts(tmp_path: Path) -> None:
    """Of one copy, or both; the answer is what the plugin gave back, the reason is counted."""
    async with (
        fake_vm().listening(tmp_path / "sock") as peer,
        running(tmp_path, policy=KEEP) as run,
    ):
        await until(lambda: run.session.state is State.ATTACHED)
        flip(peer, 5)
        flip(peer, 2, at=16)
        peer.plugin.convert(1, 16 * PAGE, 2 * PAGE, to_private=False)
        assert await run.session.ask(Flush(Copy.PRIVATE)) == 2 * PAGE
        assert peer.plugin.ledger.stale(Copy.SHARED) == 5 * PAGE
        assert await run.session.ask(Flush(None)) == 5 * PAGE
        assert await run.session.ask(Flush(None)) == 0
        assert run.session.guest.stats.discarded_bytes == {
            Copy.PRIVATE: {"flush": 2 * PAGE},
            Copy.SHARED: {"flush": 5 * PAGE},
        }


async def test_a_backlog_is_followed_to_its_end(tmp_path: Path) -> None:
    """A flush, and a VM that is left, know of all that is on record, more than one reply has."""
    many = 3 * READ_MOST
    slow = {"policy": KEEP, "notify": "100 s", "lease": "300 s"}
    async with fake_vm().listening(tmp_path / "sock") as peer:

        def convert(*, to_private: bool) -> None:
            for page in range(many):
                peer.plugin.convert(1, 2 * page * PAGE, PAGE, to_private=to_private)

        async with running(tmp_path, **slow) as run:
            stats = run.session.guest.stats
            await until(lambda: run.session.state is State.ATTACHED)
            peer.plugin.convert(1, 63 * MIB, PAGE, to_private=True)
            await until(lambda: stats.followed_conversions == 1)  # the next bell is far away
            convert(to_private=True)
            assert await run.session.ask(Flush(None)) == (many + 1) * PAGE
            assert stats.followed_conversions == many + 1
            convert(to_private=False)
        assert stats.followed_conversions == 2 * many + 1


async def test_what_needs_the_vm_is_unavailable_without(tmp_path: Path) -> None:
    """A flush of nobody fails at once; settings are taken for later."""
    async with running(tmp_path) as run:
        await until(lambda: run.session.state is State.BACKOFF)
        with pytest.raises(UnavailableError, match="not attached: backoff"):
            await run.session.ask(Flush(None))
        await run.session.ask(SetBudget(PAGE))
        async with fake_vm().listening(tmp_path / "sock") as peer:
            run.session.hurry()
            await until(lambda: run.session.state is State.ATTACHED)
            assert peer.plugin.ledger.budget == PAGE


async def test_flush_of_a_vm_that_goes_is_answered(tmp_path: Path) -> None:
    """The plugin takes the request and never answers: the break does."""
    peer = fake_vm()
    peer.replies["x-upm-discard"].append({})
    async with peer.listening(tmp_path / "sock"), running(tmp_path, policy=KEEP) as run:
        await until(lambda: run.session.state is State.ATTACHED)
        flip(peer)
        flush = run.session.ask(Flush(None))
        await until(lambda: peer.counts["x-upm-discard"] == 1)
        await peer.hang_up()
        with pytest.raises(UnavailableError, match="went away"):
            await flush


async def test_too_many_asks_are_refused(tmp_path: Path) -> None:
    """What waits for a session that does not come to it is bounded."""
    async with running(tmp_path) as run:
        asked = [run.session.ask(SetBudget(PAGE)) for _ in range(vm.ASKS_MOST + 1)]
        with pytest.raises(UnavailableError):
            await asked[-1]
        await asyncio.gather(*asked[:-1])


async def test_restarted_qemu_keeps_counters_monotonic(tmp_path: Path) -> None:
    """The plugin's counters begin again, ours go on."""
    async with running(tmp_path, policy=KEEP) as run:
        stats = run.session.guest.stats
        for boot in (1, 2, 3):
            async with fake_vm(uuid=f"{boot:08d}-0000-4000-8000-000000000000").listening(
                tmp_path / "sock"
            ) as peer:
                run.session.hurry()
                await until(lambda: run.session.state is State.ATTACHED)
                flip(peer, boot)
                await until(lambda: run.session.guest.ledger.stale_bytes)
                assert await run.session.ask(Flush(None)) == boot * PAGE
            await until(lambda: run.session.state is State.BACKOFF)
        async with fake_vm().listening(tmp_path / "sock"):
            run.session.hurry()
            await until(lambda: run.session.state is State.ATTACHED)
    assert stats.discarded_bytes[Copy.SHARED] == {"flush": 6 * PAGE}
    assert stats.reconnects == 3


async def test_everything_is_given_back_in_one_request(tmp_path: Path) -> None:
    """Of a copy that is no longer kept, however many pieces it is in: no list is made of them."""
    policy = {"name": "lazy", "pressure": 10.0}
    async with (
        fake_vm().listening(tmp_path / "sock") as peer,
        running(tmp_path, policy=policy) as run,
    ):
        await until(lambda: run.session.state is State.ATTACHED)
        for page in range(0, 16384, 2):
            flip(peer, 1, page)
        await until(lambda: run.session.guest.ledger.stale_bytes == 8192 * PAGE)
        run.session.feel(Pressure(host_some_percent=50))
        await until(lambda: peer.plugin.ledger.stale(Copy.SHARED) == 0)
        await until(lambda: run.session.guest.stats.discards[Copy.SHARED])
    asked = [arguments for name, arguments in peer.asked if name == "x-upm-discard"]
    assert [arguments["all"] for arguments in asked] == [True]
    assert run.session.guest.stats.discards[Copy.SHARED] == {"pressure": 1}


class Restless(Policy):
    """Wants to be asked again at once, always."""

    def decide(self, _batch: Any, _ledger: Any, now_ns: int, _pressure: Any) -> Decision:
        """Nothing to do."""
        return Decision(frozenset(Copy), wake_at_ns=now_ns)


def test_a_restless_policy_has_pauses(tmp_path: Path) -> None:
    """An idle VM costs no reads without end, whatever its policy wishes: by a clock that jumps."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        plugin = FakePlugin({"ram": MIB}, clock_ns=loop.monotonic_ns)
        async with (
            FakeVm(plugin).listening(tmp_path / "sock") as peer,
            running(tmp_path, loop.clock, lease="60 s") as run,
        ):
            run.session.guest.policy._policy = Restless(None)
            await until(lambda: run.session.state is State.ATTACHED)
            before = peer.counts["x-upm-read"]
            await asyncio.sleep(10)
            assert 900 < peer.counts["x-upm-read"] - before <= 1001

    run_in_virtual_time(main())


@pytest.mark.untrue("its figures are not those of its ledger")
def test_a_plugin_that_contradicts_itself_is_read_seldom(tmp_path: Path) -> None:
    """Figures that no reading of the ledger can explain: ten minutes of a clock that jumps."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        plugin = FakePlugin({"ram": MIB}, clock_ns=loop.monotonic_ns)
        peer, known = FakeVm(plugin), plugin.__call__

        def lie(command: str, arguments: Any) -> object:
            answer: Any = known(command, arguments) if command.startswith("x-upm") else None
            if command == "x-upm-query":
                answer["stale"]["shared"] += PAGE
            return peer._handle(command, arguments) if answer is None else answer

        peer.handler = lie
        async with peer.listening(tmp_path / "sock"), running(tmp_path, loop.clock) as run:
            await until(lambda: run.session.state is State.ATTACHED)
            await asyncio.sleep(600)
            assert peer.counts["x-upm-stale"] / 2 < 20
            assert run.session.view().stale_bytes[Copy.SHARED] == PAGE

    run_in_virtual_time(main())


async def test_a_qemu_without_names_may_have_a_uuid(tmp_path: Path) -> None:
    """Each is asked for, whether or not the other is known."""
    uuid = "11111111-2222-4333-8444-555555555555"
    peer = fake_vm(uuid=uuid)
    peer.replies["query-name"].append(ReplyError("no", kind="CommandNotFound"))
    async with peer.listening(tmp_path / "sock"), running(tmp_path) as run:
        await until(lambda: run.session.state is State.ATTACHED)
        assert (run.session.identity.name, run.session.view().uuid) == (None, uuid)


async def test_policy_may_name_reasons_without_end(tmp_path: Path) -> None:
    """Reasons become labels of metrics: a bounded number is told apart."""
    async with fake_vm().listening(tmp_path / "sock"), running(tmp_path) as run:
        for number in range(100):
            run.session.guest.stats.count_discard(Copy.SHARED, f"r{number}", PAGE, 0)
        reasons = run.session.view().stats.discards[Copy.SHARED]
        assert (len(reasons), reasons["other"]) == (17, 84)
        assert Discard(Copy.SHARED, PageSet(), "x")


async def test_defaults_are_applied(tmp_path: Path) -> None:
    """Lease, doorbell and budget reach the plugin as they stand in the configuration."""
    settings = VmSettings.model_validate({"lease": "7 s", "notify": "30 ms", "budget": "3 MiB"})
    async with (
        fake_vm().listening(tmp_path / "sock") as peer,
        running(tmp_path, **settings.model_dump(exclude={"policy"})) as run,
    ):
        await until(lambda: run.session.state is State.ATTACHED)
        worker = peer.plugin.worker
        assert (worker.lease_ms, worker.notify_ms) == (7000, 30)
        assert (peer.plugin.ledger.budget, run.session.view().plugin_version) == (3 * MIB, "0.1.0")
