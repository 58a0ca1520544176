# SPDX-License-Identifier: GPL-2.0-or-later
"""A session with a VM that is not there, taken, silent, refused or faulty."""

import asyncio
import contextlib
import socket
import sys
from pathlib import Path

import pytest

from qmp_upm import qmp, serving, vm
from qmp_upm.events import HostEventName
from qmp_upm.qmp import Monitor
from qmp_upm.stats import State
from qmp_upm.testing import Close, Drop, FakeQemu, Garbage, Script
from tests.unit.sessions import MIB, PAGE, fake_vm, running, until


async def test_nobody_there_is_backoff(tmp_path: Path) -> None:
    """And said once, with a hint, however often it is tried."""
    async with running(tmp_path) as run:
        await until(lambda: run.session.state is State.BACKOFF)
        run.session.hurry()
        await until(lambda: not run.session._hurry)
        trouble = run.session.view().trouble
        assert trouble is not None
        assert "permissions" in trouble.hint
        assert run.lines().count('"lost"') == 1


async def test_taken_monitor_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another client holds it; when that one has gone, the session attaches."""
    seconds = qmp.CONNECT_SECONDS
    async with fake_vm().listening(tmp_path / "sock"):
        other = Monitor(str(tmp_path / "sock"))
        await other.connect()
        monkeypatch.setattr(qmp, "CONNECT_SECONDS", 0.05)
        async with running(tmp_path) as run:
            await until(lambda: run.session.state is State.BUSY)
            monkeypatch.setattr(qmp, "CONNECT_SECONDS", seconds)
            await other.close()
            run.session.hurry()
            await until(lambda: run.session.state is State.ATTACHED)


async def test_full_queue_of_a_taken_monitor_is_busy(tmp_path: Path) -> None:
    """The kernel says EAGAIN, which asyncio would take for a connection on its way."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(tmp_path / "sock"))
        server.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "sock"))
        async with running(tmp_path) as run:
            await until(lambda: run.session.state is State.BUSY)


async def test_no_answer_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that greets and then does not answer, and one that does not even greet after that."""
    monkeypatch.setattr(qmp, "EXECUTE_SECONDS", 1)
    monkeypatch.setattr(qmp, "CONNECT_SECONDS", 1)
    plan = Script()
    plan.add("x-upm-read", None, Drop())
    plan.add("greeting", None, Drop())
    async with fake_vm(plan).listening(tmp_path / "sock") as peer, running(tmp_path) as run:
        await until(lambda: run.session.state is State.SILENT)
        run.session.hurry()
        await until(lambda: peer.connections == 2)
        run.session.hurry()
        await until(lambda: run.session.state is State.ATTACHED)
    states = [data["state"] for name, data in run.told if name is HostEventName.VM_STATE]
    assert states == ["attached", "silent", "attached", "stopped"]


async def test_stopped_qemu_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken by somebody else, although it does not greet either; the hint wakes it up."""
    monkeypatch.setattr(qmp, "CONNECT_SECONDS", 0.2)
    program = (
        "import os, signal, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]);"
        "s.listen(); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path / "sock")
    )
    try:
        async with running(tmp_path) as run:
            await until((tmp_path / "sock").exists)
            run.session.hurry()
            await until(lambda: run.session.state is State.SILENT)
            trouble = run.session.view().trouble
            assert trouble is not None
            assert f"kill -CONT {process.pid}" in trouble.hint
    finally:
        process.kill()
        await process.wait()


async def test_no_plugin_is_refused(tmp_path: Path) -> None:
    """With the line that loads it; and attached when the VM was started again with it."""
    peer = fake_vm()
    peer.replies["query-commands"].append([{"name": "query-commands"}])
    async with peer.listening(tmp_path / "sock"), running(tmp_path) as run:
        await until(lambda: run.session.state is State.REFUSED)
        trouble = run.session.view().trouble
        assert trouble is not None
        assert "plugin env" in trouble.hint
        assert run.session.view().qemu_version == "10.0.2"
        run.session.hurry()
        await until(lambda: run.session.state is State.ATTACHED)
        assert run.session.view().trouble is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"[" * 200_000 + b"\n",
        b"\xff\xfe\n",
        b"\x00\n",
        b"not json\n",
        b'{"event": "X_UPM_DISCARDED", "data": {"id": "x"}, "timestamp": {}}\n',
        b'{"return": "' + b"x" * (3 << 20) + b'"}\n',
    ],
    ids=["nested", "bad-utf8", "nul", "no-json", "bad-data", "giant"],
)
async def test_garbage_is_faulty_and_tried_again(
    tmp_path: Path, garbage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a peer sends, the session lives, and is attached again once the peer is well."""
    monkeypatch.setattr(qmp, "EXECUTE_SECONDS", 5)
    plan = Script()
    plan.add("x-upm-read", None, Garbage(garbage))
    async with fake_vm(plan).listening(tmp_path / "sock"), running(tmp_path) as run:
        await until(lambda: run.session.state is State.FAULTY)
        run.session.hurry()
        await until(lambda: run.session.state is State.ATTACHED)


async def test_lies_are_faulty(tmp_path: Path) -> None:
    """A record beyond its region's end breaks the session, not the daemon."""
    peer = fake_vm()
    lie = [1, 64 * MIB, PAGE, 1, 1, 5, 1]
    peer.replies["x-upm-read"].append({"cursor": 1, "dropped": 0, "records": [lie]})
    async with peer.listening(tmp_path / "sock"), running(tmp_path) as run:
        await until(lambda: run.session.state is State.FAULTY)
        run.session.hurry()
        await until(lambda: run.session.state is State.ATTACHED)
        assert run.session.guest.stats.reconnects == 1


async def test_endless_ledger_is_faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin whose ledger has no end is not listened to for ever."""
    monkeypatch.setattr(serving, "RESYNC_SECONDS", 0.05)
    peer = fake_vm()
    at = iter(range(PAGE, 1 << 40, PAGE))
    peer.handler = lambda command, arguments: (
        {"ranges": [], "cursor": next(at), "done": False}
        if command == "x-upm-stale"
        else peer._handle(command, arguments)
    )
    async with peer.listening(tmp_path / "sock"), running(tmp_path) as run:
        await until(lambda: run.session.state is State.FAULTY)


async def test_ledger_beyond_any_budget_is_faulty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a peer claims to hold costs no memory without end."""
    monkeypatch.setattr(serving, "RANGES_LEAST", 8)
    peer = fake_vm()
    ranges = [[2 * PAGE * number, PAGE] for number in range(9)]
    peer.replies["x-upm-stale"].append({"ranges": ranges, "cursor": 64 * MIB, "done": True})
    async with peer.listening(tmp_path / "sock"), running(tmp_path, budget="16 KiB") as run:
        await until(lambda: run.session.state is State.FAULTY)
        run.session.hurry()
        await until(lambda: run.session.state is State.ATTACHED)


async def test_more_ram_than_there_is_is_faulty(tmp_path: Path) -> None:
    """A peer that says it has petabytes is not believed."""
    peer = fake_vm()
    query = peer.plugin("x-upm-query", {})
    region = query["regions"][0] | {"size": (1 << 43) - PAGE}
    regions = [region | {"id": number} for number in range(1, 6)]
    peer.replies["x-upm-query"].append(query | {"regions": regions})
    async with peer.listening(tmp_path / "sock"), running(tmp_path) as run:
        await until(lambda: run.session.state is State.FAULTY)
        run.session.hurry()
        await until(lambda: run.session.state is State.ATTACHED)


async def test_close_in_mid_reply_is_backoff(tmp_path: Path) -> None:
    """QEMU was killed: the session waits for it and counts the reconnect."""
    plan = Script()
    plan.add("x-upm-read", None, None, Close(after=3))
    async with fake_vm(plan).listening(tmp_path / "sock"), running(tmp_path) as run:
        await until(lambda: run.session.state is State.BACKOFF)
        run.session.hurry()
        await until(lambda: run.session.state is State.ATTACHED)
        assert run.session.guest.stats.reconnects == 1


async def test_peer_that_breaks_at_once_is_not_hammered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attaching does not make the pause short again: only a session that lasted does."""
    pauses: list[float] = []

    async def note(_session: vm.Session, seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(vm.Session, "_pause", note)
    peer = fake_vm()
    lie = {"cursor": 1, "dropped": 0, "records": [[1, 64 * MIB, PAGE, 1, 1, 5, 1]]}
    peer.replies["x-upm-read"].extend([lie] * 100)
    async with peer.listening(tmp_path / "sock"), running(tmp_path):
        await until(lambda: len(pauses) > 8)
    assert pauses[:7] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0]


async def test_broken_command_list_is_faulty(tmp_path: Path) -> None:
    """What is no QEMU at all: it greets, and answers everything with an empty object."""
    async with FakeQemu(lambda _c, _a: {}).listening(tmp_path / "sock"), running(tmp_path) as run:
        await until(lambda: run.session.state is State.FAULTY)
