# SPDX-License-Identifier: GPL-2.0-or-later
"""A session against a peer that plays QEMU with the plugin, and then does not."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from qmp_upm import vm
from qmp_upm.config import VmSettings
from qmp_upm.policy import Batch, Decision, Policy
from qmp_upm.protocol import COMMANDS, Copy
from qmp_upm.rotation import CappedDirectory
from qmp_upm.stats import State
from qmp_upm.telemetry import Telemetry, TelemetryWriter
from qmp_upm.vm import Session

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}}}
GREETING["QMP"]["capabilities"] = ["oob"]  # type: ignore[assignment]
QUERY: dict[str, Any] = {
    "version": "0",
    "protocol": 1,
    "vm-kind": "sw-protected",
    "conversion": "two-copy",
    "regions": [
        {
            "id": 1,
            "name": "ram",
            "size": 1 << 20,
            "backing": "memfd",
            "stale-private": 0,
            "stale-shared": 0,
        }
    ],
    "stale": {"private": 0, "shared": 0, "peak": 0},
    "records": {"head": 0, "oldest": 0, "dropped": 0},
    "counters": {},
}


class Peer:
    """Answers each command with what ``replies`` has for it, or does what is there."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.connections = 0
        self.cursor = 0
        self.records: list[list[int]] = []
        self.raw: dict[str, bytes] = {}
        self.errors: dict[str, str] = {}

    def _reply(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "query-commands":
            return [{"name": command} for command in COMMANDS]
        if name == "x-upm-query":
            return QUERY | {"records": {"head": self.cursor, "oldest": 0, "dropped": 0}}
        if name == "x-upm-stale":
            return {"ranges": [], "cursor": 1 << 20, "done": True}
        if name == "x-upm-read":
            records, self.records = self.records, []
            self.cursor = arguments["cursor"] + len(records)
            return {"cursor": self.cursor, "dropped": 0, "records": records}
        return {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        writer.write(json.dumps(GREETING).encode() + b"\n")
        text = ""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                text += data.decode()
                while text.strip():
                    request, end = json.JSONDecoder().raw_decode(text.lstrip())
                    text = text.lstrip()[end:]
                    self._answer(request, writer)
                await writer.drain()
        writer.close()

    def _answer(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        name = request.get("execute") or request["exec-oob"]
        same_id = {"id": request["id"]} if "id" in request else {}
        arguments = request.get("arguments", {})
        self.asked.append((name, arguments))
        if name in self.raw:
            writer.write(self.raw.pop(name))
        elif name in self.errors:
            error = {"class": "GenericError", "desc": self.errors.pop(name)}
            writer.write(json.dumps({"error": error} | same_id).encode() + b"\n")
        else:
            reply = {"return": self._reply(name, arguments)} | same_id
            writer.write(json.dumps(reply).encode() + b"\n")

    def count(self, name: str) -> int:
        """How often a command was asked."""
        return sum(1 for asked, _ in self.asked if asked == name)


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    """Listening at tmp_path/sock."""
    made = Peer()
    server = await asyncio.start_unix_server(made.serve, str(tmp_path / "sock"))
    yield made
    server.close()


async def until(done: Callable[[], bool]) -> None:
    """Waits for it, twenty seconds at most."""
    async with asyncio.timeout(20):
        while not done():  # noqa: ASYNC110 - states have no event to wait for
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(tmp_path: Path, **table: Any) -> AsyncIterator[tuple[Session, Telemetry]]:
    """A session with that peer."""
    settings = {"notify": "1 ms", "lease": "0.1 s"} | table
    telemetry = TelemetryWriter(CappedDirectory(tmp_path, 1 << 20, 4 << 20)).of("guest")
    session = Session(
        "guest", str(tmp_path / "sock"), VmSettings.model_validate(settings), telemetry
    )
    task = asyncio.create_task(session.run())
    yield session, telemetry
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_attaches_and_follows(tmp_path: Path, peer: Peer) -> None:
    """It configures, reads, renews the lease by reading, and tells the telemetry."""
    peer.records = [[1, 0, 4096, 1, 1, 5, 1]]
    async with running(tmp_path) as (session, telemetry):
        await until(lambda: peer.count("x-upm-read") > 2)
        assert session.state is State.ATTACHED
    telemetry._writer.write_queued()
    assert '"conversions": 1' in telemetry.path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "garbage",
    [
        b"[" * 200_000 + b"\n",
        b"\xff\xfe\n",
        b"\x00\n",
        b"{}\n",
        b'{"return": 5, "id": 7}\n',
        b"not json\n",
        b'{"event": 3}\n',
    ],
    ids=["nested", "bad-utf8", "nul", "empty", "wrong-id", "no-json", "bad-event"],
)
async def test_garbage_ends_in_another_try(
    tmp_path: Path, peer: Peer, garbage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a peer sends, the session lives, and is attached again once the peer is well."""
    monkeypatch.setattr("qmp_upm.qmp.EXECUTE_SECONDS", 0.3)
    peer.raw["x-upm-query"] = garbage
    async with running(tmp_path) as (session, _):
        await until(lambda: peer.connections > 1 and session.state is State.ATTACHED)


async def test_lies_end_in_another_try(tmp_path: Path, peer: Peer) -> None:
    """A record beyond its region's end breaks the session, not the daemon."""
    peer.records = [[1, 1 << 20, 4096, 1, 1, 5, 1]]
    async with running(tmp_path) as (session, _):
        await until(lambda: peer.connections > 1 and session.state is State.ATTACHED)


async def test_refused_discard_is_no_break(tmp_path: Path, peer: Peer) -> None:
    """A region that went between decision and request: said, read anew, and on with the session."""
    peer.records = [[1, 0, 4096, 1, 1, 5, 1]]
    peer.errors["x-upm-discard"] = "Parameter 'ranges' names a region that is not there"
    policy = {"name": "batched", "max_delay": "1 ms"}
    async with running(tmp_path, policy=policy) as (session, telemetry):
        await until(lambda: peer.count("x-upm-stale") > 2)
        assert (session.state, peer.connections) == (State.ATTACHED, 1)
        telemetry._writer.write_queued()
    assert '"discard-refused"' in telemetry.path.read_text(encoding="utf-8")


async def test_busy_discard_is_sent_again(tmp_path: Path, peer: Peer) -> None:
    """A queue that others have filled is waited for."""
    peer.records = [[1, 0, 4096, 1, 1, 5, 1]]
    peer.errors["x-upm-discard"] = "busy: too many discards are outstanding"
    async with running(tmp_path, policy={"name": "batched", "max_delay": "1 ms"}):
        await until(lambda: peer.count("x-upm-discard") == 2)
    assert peer.connections == 1
    first, second = (arguments for name, arguments in peer.asked if name == "x-upm-discard")
    assert first == second


class Raises(Policy):
    """Well at first."""

    def decide(self, batch: Batch, *_: Any) -> Decision:
        """Fails at the first conversion."""
        if len(batch):
            raise KeyError("oops")
        return Decision(frozenset(Copy))


async def test_raising_policy_falls_back_to_eager(tmp_path: Path, peer: Peer) -> None:
    """Its VM is served on, eagerly; telemetry says why."""
    peer.records = [[1, 0, 4096, 1, 1, 5, 1]]
    async with running(tmp_path) as (session, telemetry):
        session._policy = Raises(None)
        await until(lambda: peer.count("x-upm-configure") == 2)
        assert session.state is State.ATTACHED
        telemetry._writer.write_queued()
    configured = [arguments for name, arguments in peer.asked if name == "x-upm-configure"]
    assert [c["private"] for c in configured[:2]] == ["defer", "eager"]
    assert "oops" in telemetry.path.read_text(encoding="utf-8")


async def test_peer_that_breaks_at_once_is_not_hammered(
    tmp_path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attaching does not make the pause short again: only a session that lasted does."""
    monkeypatch.setattr(vm, "BACKOFF_FIRST", 0.02)
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds > 0.01:
            pauses.append(seconds)
        await sleep(min(seconds, 0.01))

    monkeypatch.setattr(vm.asyncio, "sleep", note)

    async with running(tmp_path):
        while peer.connections < 6:
            peer.records = [[1, 1 << 20, 4096, 1, 1, 5, 1]]
            await sleep(0.005)
    assert pauses[4] > 4 * pauses[0]


async def test_trouble_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VM that is off is tried again and again, and fills neither log nor telemetry."""
    monkeypatch.setattr(vm, "BACKOFF_FIRST", 0.001)
    monkeypatch.setattr(vm, "BACKOFF_MOST", 0.002)
    attempts = 0
    connect = vm.Monitor.connect

    async def count(self: vm.Monitor) -> None:
        nonlocal attempts
        attempts += 1
        await connect(self)

    monkeypatch.setattr(vm.Monitor, "connect", count)
    async with running(tmp_path) as (_, telemetry):
        await until(lambda: attempts > 5)
    telemetry._writer.write_queued()
    assert telemetry.path.read_text(encoding="utf-8").count('"lost"') == 1
