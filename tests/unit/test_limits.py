# SPDX-License-Identifier: GPL-2.0-or-later
"""What one peer can make the daemon keep, log, show or compute has an end (`qmp_upm.limits`).

Real: sessions, the host and its sockets. Simulated: QEMU with the plugin, which here is hostile.
"""

import contextlib
import json
import re
import socket
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from qmp_upm import limits
from qmp_upm.budget import Claim, _divide
from qmp_upm.credentials import Credentials, read_credentials
from qmp_upm.errors import CommandError
from qmp_upm.events import HostEventName
from qmp_upm.identity import file_stem, usable
from qmp_upm.limits import ERROR_CHARACTERS, Allowance, printable
from qmp_upm.stats import State
from qmp_upm.testing import ReplyError
from qmp_upm.testing.faults import Flood, Script
from qmp_upm.testing.peer import encode, listen_as_another
from tests.unit.hosts import FAST, KEEP, hosting, states, write
from tests.unit.sessions import MIB, PAGE, fake_vm, running, until


@given(st.text(max_size=600))
def test_a_peers_text_is_short_and_still(text: str) -> None:
    """Whatever it is, no error says more, or steers a terminal."""
    said = CommandError(text, hint="").message
    assert len(said) <= ERROR_CHARACTERS
    assert said.isprintable()
    assert said == text or len(text) > ERROR_CHARACTERS or not text.isprintable()
    assert said == printable(said)


def test_an_allowance_comes_back_with_time() -> None:
    """A burst after a pause, and then no more than it gains."""
    now = [0.0]
    allowance = Allowance(10, lambda: now[0])
    burst = int(10 * limits.BURST_SECONDS)
    assert [allowance.take(1) for _ in range(burst + 1)] == [True] * burst + [False]
    now[0] = 0.2
    assert [allowance.take(1) for _ in range(2)] == [True, False]
    now[0] = 1e6
    assert allowance.take(burst)
    assert not allowance.take(1)


@pytest.mark.parametrize("size", [0, 100_000])
async def test_a_flood_of_events_ends_the_session(tmp_path: Path, size: int) -> None:
    """Many small ones, or some long ones: it is said what QEMU did, and QEMU is left alone."""
    event = encode({"timestamp": {}, "event": "CHATTER", "data": {"x": "y" * size}})
    plan = Script()
    plan.add("x-upm-read", None, Flood(50_000 if not size else 100, event))
    with capture_logs():
        async with fake_vm(plan).listening(tmp_path / "sock") as peer, running(tmp_path) as run:
            await until(lambda: run.session.state is State.FAULTY)
            trouble = run.session.view().trouble
            assert trouble is not None
            assert "that nobody asked for" in trouble.error
            assert run.session._penalty
            assert peer.connections == 1


async def test_regions_that_are_not_listed_are_not_kept(tmp_path: Path) -> None:
    """Their records are counted and left out: the daemon's memory of the guest stays as it is."""
    peer = fake_vm()
    numbers = count()
    head = [0]

    def read(arguments: dict[str, int]) -> object:
        head[0] = arguments["cursor"] + 1024
        rows = [
            [2 + k // 32768, (k % 32768) << 28, PAGE, 1, 0, k, 1]
            for _, k in zip(range(1024), numbers, strict=False)
        ]
        return {"cursor": head[0], "dropped": 0, "records": rows}

    peer.replies["x-upm-read"].extend([read] * 50)
    async with peer.listening(tmp_path / "sock"), running(tmp_path) as run:
        await until(lambda: run.session.guest.stats.unlisted_records == 50 * 1024)
        assert run.session.guest._touched.bytes == 0
        assert run.session.guest.ledger.stale_bytes == 0
        assert run.session.guest.stats.followed_conversions == 0


async def test_what_is_known_of_a_guest_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it the pages are forgotten, the ledger is read again, and the session goes on."""
    monkeypatch.setattr("qmp_upm.guest.WEIGH_EVERY", 64)
    monkeypatch.setattr("qmp_upm.guest.KNOWN_BYTES_MOST", 1000)
    async with (
        fake_vm().listening(tmp_path / "sock") as peer,
        running(tmp_path, policy={"name": "eager", "copies": "none"}) as run,
    ):
        await until(lambda: run.session.state is State.ATTACHED)
        before = run.session.guest.stats.resyncs
        for page in range(0, 4096, 2):
            peer.plugin.convert(1, page * PAGE, PAGE, to_private=True)
        await until(lambda: run.session.guest.stats.followed_conversions == 2048)
        await until(lambda: run.session.guest.stats.resyncs > before)
        assert run.session.guest.ledger.stale_bytes == 2048 * PAGE
        assert run.session.state is State.ATTACHED


async def test_expired_leases_are_worked_off_together(tmp_path: Path) -> None:
    """One line of the log, few resynchronisations; none is forgotten."""
    bell = encode({"timestamp": {}, "event": "X_UPM_LEASE_EXPIRED", "data": {}})
    plan = Script()
    plan.add("x-upm-read", None, *[Flood(200, bell)] * 10)
    with capture_logs() as logged:
        async with fake_vm(plan).listening(tmp_path / "sock") as peer, running(tmp_path) as run:
            await until(lambda: peer.counts["x-upm-read"] > 12)
            expiries = run.session.guest.stats.lease_expiries
            assert 1 <= expiries < 10
            peer.emit("X_UPM_LEASE_EXPIRED", {})
            await until(lambda: run.session.guest.stats.lease_expiries > expiries)
    assert [line["event"] for line in logged].count("lease-expired") == 1
    told = Counter(name for name, _ in run.told)
    assert told[HostEventName.LEASE_EXPIRED] <= 1 + run.session.guest.stats.lease_expiries


async def test_long_errors_are_nobodys_burden(tmp_path: Path) -> None:
    """1.9 MB of error, another one each time: state, log and telemetry have 256 characters."""
    peer = fake_vm()
    peer.replies["x-upm-query"].extend(
        ReplyError(f"{n} \x1b]0;pwned\x07" + "x" * 1_900_000) for n in range(100)
    )
    with capture_logs() as logged:
        async with peer.listening(tmp_path / "sock"), running(tmp_path) as run:
            await until(lambda: run.session.state is State.FAULTY)
            trouble = run.session.view().trouble
            assert trouble is not None
            assert len(trouble.error) == ERROR_CHARACTERS
            assert trouble.error.isprintable()
            assert max(map(len, run.lines().splitlines())) < 2000
    assert max(len(json.dumps(line, default=str)) for line in logged) < 2000


def in_one(peer: socket.socket) -> Credentials:
    """As all sockets of this test's process are, whoever made them listen."""
    return Credentials(4711, read_credentials(peer).user)


def in_none(peer: socket.socket) -> Credentials:
    """As a process of another pid namespace."""
    return Credentials(0, read_credentials(peer).user)


async def test_a_process_is_served_at_one_monitor(tmp_path: Path) -> None:
    """The others are refused, and say where it is served; once it goes, another takes over."""
    file = write(tmp_path, FAST)
    with capture_logs():
        async with contextlib.AsyncExitStack() as stack:
            host = await stack.enter_async_context(hosting(file, read_credentials=in_one))
            first = contextlib.AsyncExitStack()
            await first.enter_async_context(
                fake_vm(name="x").listening(tmp_path / "vms" / "a.monitor")
            )
            await until(lambda: states(host) == {"x": "attached"})
            for name in "bcd":
                peer = fake_vm(name="ci-1").listening(tmp_path / "vms" / f"{name}.monitor")
                await stack.enter_async_context(peer)
            await until(lambda: list(states(host).values()).count("refused") == 3)
            trouble = next(view.trouble for view in host.vms() if view.trouble)
            assert "process 4711, is served as x at" in trouble.error
            await first.aclose()
            await until(lambda: "attached" in states(host).values())


async def test_sockets_of_one_process_do_not_take_the_budget(tmp_path: Path) -> None:
    """A VM keeps its half, however many monitors another one opens."""
    file = write(tmp_path, FAST + 'budget = "64 MiB"\n[defaults]\n' + KEEP)

    def read(peer: socket.socket) -> Credentials:
        path = str(peer.getpeername())
        return Credentials(1 if path.endswith("db.monitor") else 2, 0)

    with capture_logs():
        async with contextlib.AsyncExitStack() as stack:
            host = await stack.enter_async_context(hosting(file, read_credentials=read))
            for name in ["db", *map(str, range(20))]:
                peer = fake_vm(name=name).listening(tmp_path / "vms" / f"{name}.monitor")
                await stack.enter_async_context(peer)
            await until(lambda: list(states(host).values()).count("refused") == 19)
            await until(lambda: host.vm("db").budget_bytes == 32 * MIB)


async def test_without_a_process_they_share_one_part(tmp_path: Path) -> None:
    """Sockets of another pid namespace are served each, and have one default part together."""
    file = write(tmp_path, FAST + 'budget = "64 MiB"\n[defaults]\n' + KEEP)

    def read(peer: socket.socket) -> Credentials:
        path = str(peer.getpeername())
        return Credentials(1 if path.endswith("db.monitor") else 0, 0)

    async with contextlib.AsyncExitStack() as stack:
        host = await stack.enter_async_context(hosting(file, read_credentials=read))
        for name in ["db", *"1234"]:
            peer = fake_vm(name=name).listening(tmp_path / "vms" / f"{name}.monitor")
            await stack.enter_async_context(peer)
        expected = {"db": 32 * MIB} | dict.fromkeys("1234", 8 * MIB)
        await until(lambda: {v.name: v.budget_bytes for v in host.vms()} == expected)


def test_parts_without_a_process_are_one_for_each_user() -> None:
    """And a weight of theirs counts among themselves only."""

    class Told:
        def __init__(self, process: int, user: int, weight: int = 100) -> None:
            self.served = Credentials(process, user)
            self.guest = self
            self.settings = self
            self.weight, self.own_budget_bytes = weight, 1 << 40

    db, a, b, c = Told(7, 0), Told(0, 1, 100), Told(0, 1, 300), Told(0, 2)
    parts = _divide(3 * 400 * PAGE, [db, a, b, c], Claim(100, 1 << 40))
    assert {n: parts[s] // PAGE for n, s in {"db": db, "a": a, "b": b, "c": c}.items()} == {
        "db": 400,
        "a": 100,
        "b": 300,
        "c": 400,
    }


async def test_a_process_keeps_its_name(tmp_path: Path) -> None:
    """One that renames itself at each reconnect is called as at first; it makes no new series."""
    file = write(tmp_path, FAST)
    peer = fake_vm(name="first")
    async with peer.listening(tmp_path / "vms" / "a.monitor"), hosting(file) as host:
        await until(lambda: states(host) == {"first": "attached"})
        for number in range(3):
            peer.name = f"other-{number}"
            connections = peer.connections
            await peer.hang_up()
            await until(lambda seen=connections: peer.connections > seen)
            await until(lambda: list(states(host).values()) == ["attached"])
            assert list(states(host)) == ["first"]


async def test_another_namespace_is_no_identity(tmp_path: Path) -> None:
    """Process 0 may take another name, as another QEMU at the same socket would."""
    file = write(tmp_path, FAST)
    peer = fake_vm(name="first")
    async with (
        peer.listening(tmp_path / "vms" / "a.monitor"),
        hosting(file, read_credentials=in_none) as host,
    ):
        await until(lambda: states(host) == {"first": "attached"})
        peer.name = "second"
        await peer.hang_up()
        await until(lambda: states(host) == {"second": "attached"})


def test_credentials_are_those_of_who_listens(tmp_path: Path) -> None:
    """And each fake is a process of its own, as QEMUs are."""
    found = []
    for name in "ab":
        with listen_as_another(tmp_path / name), socket.socket(socket.AF_UNIX) as link:
            link.connect(str(tmp_path / name))
            found.append(read_credentials(link))
    assert len({one.process for one in found} | {0}) == 3


@given(st.lists(st.text(min_size=1, max_size=150), unique=True, min_size=2, max_size=2))
def test_files_of_names_are_apart_and_stay_in_their_folder(names: list[str]) -> None:
    """Whatever a QEMU is called, its file is in the directory, and no other VM's."""
    stems = [file_stem(name) for name in names]
    assert stems[0] != stems[1]
    for stem in stems:
        assert re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", stem)
        assert stem[0] not in ".-"


@given(st.text(max_size=5000))
def test_names_are_libvirts_own(text: str) -> None:
    """As they are, if they can be printed and are not too long."""
    name = usable(text)
    assert len(name) <= 128
    assert name.isprintable()
    if text.isprintable() and text == text.strip() and len(text) <= 128 and text.strip("_ "):
        assert name == text


async def test_vms_leave_descriptors_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the limit a VM waits and says why; once there is room it is served."""
    kept = limits.FILES_KEPT
    monkeypatch.setattr("qmp_upm.qmp.FILES_KEPT", 1 << 62)
    with capture_logs():
        async with fake_vm().listening(tmp_path / "sock"), running(tmp_path) as run:
            await until(lambda: run.session.state is State.BACKOFF)
            trouble = run.session.view().trouble
            assert trouble is not None
            assert "file descriptors" in trouble.error
            monkeypatch.setattr("qmp_upm.qmp.FILES_KEPT", kept)
            await until(lambda: run.session.state is State.ATTACHED)
