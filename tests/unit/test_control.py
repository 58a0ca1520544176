# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: QMP as any client expects it, within bounds, whatever a client does."""

import asyncio
import base64
import grp
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from qemu.qmp import ExecuteError, QMPClient

from qmp_upm.connection import Limits
from qmp_upm.control import ControlServer
from qmp_upm.errors import ControlError
from qmp_upm.events import HostEvent, HostEventName
from qmp_upm.protocol import Copy
from qmp_upm.records import RECORD
from qmp_upm.stats import Trouble
from qmp_upm.trace import Block


class _Raw:
    """A client that sends whatever bytes it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def take(self) -> dict[str, Any]:
        async with asyncio.timeout(20):
            line = await self.reader.readline()
        assert line.endswith(b"\r\n") or line == b""
        return json.loads(line or b'{"closed": true}')

    async def ask(self, message: object) -> dict[str, Any]:
        self.writer.write(message if isinstance(message, bytes) else json.dumps(message).encode())
        return await self.take()

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


Connect = Callable[..., Awaitable[_Raw]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes clients, and sees to it that they are gone in the end."""
    clients = []

    async def make(server: ControlServer, state: str = "negotiated") -> _Raw:
        client = _Raw(*await asyncio.open_unix_connection(server.path))
        clients.append(client)
        if state in ("greeted", "negotiated"):
            assert "QMP" in await client.take()
        if state == "negotiated":
            assert await client.ask({"execute": "qmp_capabilities"}) == {"return": {}}
        return client

    yield make
    for client in clients:
        client.writer.transport.abort()
        await asyncio.gather(client.writer.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def qmp(server: ControlServer) -> AsyncIterator[QMPClient]:
    """QEMU's own client."""
    client = QMPClient()
    async with asyncio.timeout(20):
        await client.connect(str(server.path))
        try:
            yield client
        finally:
            await client.disconnect()


async def still_answers(server: ControlServer) -> None:
    """A client like any other is served."""
    async with qmp(server) as client:
        assert [vm["name"] for vm in await client.execute("query-vms")] == ["db", "web"]


async def until(condition: Callable[[], bool]) -> None:
    """Let the others run until this holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)


async def test_greeting_and_negotiation(server: ControlServer, connect: Connect) -> None:
    """Nothing but qmp_capabilities before negotiation, and that once; id comes back as it was."""
    client = await connect(server, "greeted")
    early = await client.ask({"execute": "query-vms", "id": [1, {"a": None}]})
    assert early["error"]["class"] == "CommandNotFound"
    assert early["id"] == [1, {"a": None}]
    wrong = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
    assert (await client.ask(wrong))["error"]["class"] == "GenericError"
    done = await client.ask({"execute": "qmp_capabilities", "id": ""})
    assert done == {"return": {}, "id": ""}
    again = await client.ask({"execute": "qmp_capabilities"})
    assert again["error"]["class"] == "CommandNotFound"


async def test_queries(server: ControlServer, connect: Connect) -> None:
    """Each query answers with the host's models as JSON."""
    client = await connect(server)
    version = (await client.ask({"execute": "query-version"}))["return"]
    assert set(version["qemu"]) == {"major", "minor", "micro"}
    vm = (await client.ask({"execute": "query-vm", "arguments": {"name": "db"}}))["return"]
    assert vm["state"] == "attached"
    assert vm["stale_bytes"] == {"private": 4096, "shared": 8192}
    assert vm["stats"]["flips"] == 7
    vms = (await client.ask({"execute": "query-vms", "arguments": {}}))["return"]
    assert vms[0] == vm
    config = await client.ask({"execute": "query-config", "arguments": {"name": "db"}})
    assert config["return"] == [
        {"key": "budget", "value": 1 << 28, "source": "config.toml [defaults]"}
    ]
    policies = {p["name"]: p for p in (await client.ask({"execute": "query-policies"}))["return"]}
    assert "max_age" in policies["lazy"]["parameters"]["properties"]
    assert policies["lazy"]["doc"]


async def test_what_a_qemu_sends_spoils_no_answer(server: ControlServer, host: Any) -> None:
    """A VM may have half a surrogate pair in an error; all VMs are listed all the same."""
    host.views["db"] = host.views["db"].model_copy(
        update={"trouble": Trouble(error="\ud800", hint="x")}
    )
    async with qmp(server) as client:
        assert (await client.execute("query-vms"))[0]["trouble"]["error"] == "\ud800"


async def test_commands_describe_themselves(server: ControlServer, connect: Connect) -> None:
    """query-commands lists each command with its docstring and the schema of its arguments."""
    client = await connect(server)
    commands = {c["name"]: c for c in (await client.ask({"execute": "query-commands"}))["return"]}
    assert {"query-vms", "set-policy", "flush", "reload", "record-start"} <= commands.keys()
    assert all(command["doc"] for command in commands.values())
    assert set(commands["flush"]["arguments"]["properties"]) == {"name", "copy"}


async def test_changes_reach_the_host(server: ControlServer, host: Any) -> None:
    """Arguments arrive validated; sizes may be texts; null is the configuration's budget."""
    lazy = {"name": "db", "policy": "lazy", "parameters": {"max_age": "5 s"}}
    async with qmp(server) as client:
        await client.execute("set-policy", lazy)
        await client.execute("set-budget", {"name": "db", "budget": "64 MiB"})
        await client.execute("set-budget", {"name": "db", "budget": 4096})
        await client.execute("set-budget", {"name": "db", "budget": None})
        assert await client.execute("flush", {"name": "db", "copy": "shared"}) == {"bytes": 12288}
        await client.execute("flush", {"name": "db"})
    assert host.asked == [
        ("set_policy", "db", "lazy", {"max_age": "5 s"}),
        ("set_budget", "db", 64 << 20),
        ("set_budget", "db", 4096),
        ("set_budget", "db", None),
        ("flush", "db", Copy.SHARED),
        ("flush", "db", None),
    ]


@pytest.mark.parametrize(
    ("command", "arguments", "kind", "part"),
    [
        ("query-vm", {"name": "x"}, "DeviceNotFound", "hint: known: db, web"),
        ("flush", {"name": "web"}, "GenericError", "not attached; hint: wait"),
        ("set-policy", {"name": "db", "policy": "greedy"}, "GenericError", "installed: lazy"),
        pytest.param("reload", {}, "GenericError", "internal error", marks=pytest.mark.traceback),
        ("quit", {}, "CommandNotFound", "query-commands"),
        ("set-budget", {"name": "db", "budget": "5 x"}, "GenericError", "budget: '5 x' is not"),
    ],
)
async def test_errors_have_a_class_and_a_hint(
    server: ControlServer, command: str, arguments: dict[str, object], kind: str, part: str
) -> None:
    """What the host raises becomes a QMP error; a defect does too, and the connection goes on."""
    async with qmp(server) as client:
        with pytest.raises(ExecuteError) as caught:
            await client.execute(command, arguments)
        assert caught.value.error_class == kind
        assert part in str(caught.value)
        assert await client.execute("query-version")


MALFORMED: list[tuple[str, bytes]] = [
    ("no JSON", b"hello\n"),
    ("a number", b"5\n"),
    ("a list", b"[1, 2]"),
    ("a text", b'"execute"\n'),
    ("empty", b"{}"),
    ("NUL", b"\0\n"),
    ("bad UTF-8", b'{"execute": "\xff\xfe"}'),
    ("half a surrogate", b'{"execute": "query-vms", "id": "\\ud800"}'),
    ("NaN", b'{"execute": "query-vms", "id": NaN}'),
    ("a huge number", b'{"execute": "query-vms", "id": ' + b"9" * 4000 + b"x}"),
    ("nested", b'{"execute": ' + b"[" * 1500 + b"]" * 1500 + b"}"),
    ("unclosed text", b'{"execute": "query\n'),
    ("closing bracket", b"}\n"),
    ("mixed brackets", b'{"execute": "query-vms"]'),
    ("command is a number", b'{"execute": 5}'),
    ("command is null", b'{"execute": null}'),
    ("unknown key", b'{"execute": "query-vms", "args": {}}'),
    ("out of band", b'{"exec-oob": "query-vms"}'),
    ("arguments are a list", b'{"execute": "query-vms", "arguments": []}'),
    ("arguments are null", b'{"execute": "query-vms", "arguments": null}'),
    ("unknown argument", b'{"execute": "query-vms", "arguments": {"x": 1}}'),
    ("missing argument", b'{"execute": "query-vm"}'),
    ("name is a number", b'{"execute": "query-vm", "arguments": {"name": 1}}'),
    ("name is empty", b'{"execute": "query-vm", "arguments": {"name": ""}}'),
    ("name is long", b'{"execute": "query-vm", "arguments": {"name": "' + b"x" * 300 + b'"}}'),
    ("negative budget", b'{"execute": "set-budget", "arguments": {"name": "db", "budget": -1}}'),
    ("huge budget", b'{"execute": "set-budget", "arguments": {"name": "db", "budget": 1e30}}'),
    ("budget is true", b'{"execute": "set-budget", "arguments": {"name": "db", "budget": true}}'),
    ("budget left out", b'{"execute": "set-budget", "arguments": {"name": "db"}}'),
    ("budget of no unit", b'{"execute": "set-budget", "arguments": {"name":"db","budget":"1 x"}}'),
    ("no such copy", b'{"execute": "flush", "arguments": {"name": "db", "copy": "both"}}'),
    ("parameters are a text", (b'{"execute":"set-policy","arguments":'
                               b'{"name":"db","policy":"lazy","parameters":"x"}}')),
    ("record that is none", b'{"execute": "record-stop", "arguments": {"name": "db"}}'),
]  # fmt: skip


@pytest.mark.parametrize("text", [text for _, text in MALFORMED], ids=[n for n, _ in MALFORMED])
async def test_malformed_input_is_an_error(
    server: ControlServer, host: Any, text: bytes, connect: Connect
) -> None:
    """Each is answered with an error that has a hint; the client and others are served after it."""
    client = await connect(server)
    answer = await client.ask(text)
    assert answer["error"]["class"] in ("GenericError", "CommandNotFound")
    assert "; hint: " in answer["error"]["desc"]
    assert len(answer["error"]["desc"]) < 500
    assert "return" in await client.ask({"execute": "query-version"})
    await still_answers(server)
    assert host.asked == []


@pytest.mark.parametrize(
    "text",
    [b'{"execute": "' + b"x" * 5000 + b'"}', b"x" * 5000, b"[" * 5000, b'{"a": "' + b"\\" * 5000],
    ids=["giant", "endless", "brackets", "escapes"],
)
async def test_what_never_ends_closes_the_connection(
    server: ControlServer, text: bytes, connect: Connect
) -> None:
    """Past the greatest length the client is told, and disconnected."""
    client = await connect(server)
    assert "longer than 4096" in (await client.ask(text))["error"]["desc"]
    assert await client.take() == {"closed": True}
    await still_answers(server)


@pytest.mark.parametrize("begun", [b"", b'{"execute": '], ids=["silent", "unfinished"])
async def test_who_does_not_go_on_is_disconnected(
    tmp_path: Path, host: Any, begun: bytes, connect: Connect
) -> None:
    """Without negotiation, or within a message, a client may be silent for so long."""
    server = ControlServer(tmp_path / "c.sock", host, Limits(patience_s=0.05))
    await server.start()
    client = await connect(server, "negotiated" if begun else "greeted")
    assert "hint: " in (await client.ask(begun))["error"]["desc"]
    assert await client.take() == {"closed": True}
    await server.stop()


SEEDS = [
    b'{"execute": "query-vm", "arguments": {"name": "db"}}',
    b'{"execute": "set-budget", "arguments": {"name": "db", "budget": "1 MiB"}, "id": [1, {}]}',
    b'{"execute": "record-start", "arguments": {"name": "db"}}',
    b'{"execute": "flush", "arguments": {"name": "db", "copy": "shared"}}',
]


def mutated(random: Random) -> bytes:
    """A command with a few bytes put in, changed and taken out."""
    text = bytearray(random.choice(SEEDS))
    for _ in range(random.choice([0, 1, 3, 20])):
        at = random.randrange(len(text))
        text[at : at + random.randrange(3)] = random.randbytes(random.randrange(3))
    return bytes(text)


async def test_mutated_commands(server: ControlServer, host: Any, connect: Connect) -> None:
    """Clients that send them, and leave at any moment, cost nothing and hold up nobody."""
    random = Random(7)  # noqa: S311 - the same each time
    for number in range(300):
        client = await connect(server, random.choice(["new", "greeted", "negotiated"]))
        for _ in range(random.randrange(6)):
            client.writer.write(mutated(random) * random.choice([1, 1, 40]))
        client.writer.write(b"\n")
        for _ in range(random.randrange(20)):
            await asyncio.sleep(0)
        client.writer.transport.abort()
        await until(lambda: not server._tasks)
        if number % 50 == 0:
            await still_answers(server)
            await until(lambda: not server._tasks)
    assert not host.events
    assert not host.batches


async def test_commands_in_one_piece_and_in_bytes(server: ControlServer, connect: Connect) -> None:
    """Commands without a line break between them are answered in order, also byte by byte."""
    client = await connect(server)
    text = b'{"execute":"query-version","id":1}{"execute":"nope","id":2}\n{"execute":'
    for byte in text:
        client.writer.write(bytes([byte]))
        await client.writer.drain()
    assert (await client.take())["id"] == 1
    assert (await client.take())["id"] == 2
    assert (await client.ask(b'"query-version","id":3}'))["id"] == 3


async def test_events_reach_every_client_after_negotiation(
    server: ControlServer, host: Any, connect: Connect
) -> None:
    """With QMP's timestamp; a client that has not negotiated gets none."""
    early, late = await connect(server), await connect(server, "greeted")
    host.events.put(HostEvent(HostEventName.BUDGET_REACHED, "db", {"budget_bytes": 5}))
    event = await early.take()
    assert event["event"] == "BUDGET_REACHED"
    assert event["data"] == {"vm": "db", "budget_bytes": 5}
    assert set(event["timestamp"]) == {"seconds", "microseconds"}
    assert await late.ask({"execute": "qmp_capabilities"}) == {"return": {}}
    host.events.put(HostEvent(HostEventName.CONFIG_RELOADED, None))
    assert (await late.take())["event"] == "CONFIG_RELOADED"


async def test_events_flow_while_a_command_runs(
    server: ControlServer, host: Any, connect: Connect
) -> None:
    """A slow command holds up neither the client's events nor other clients."""
    host.gate.clear()
    client = await connect(server)
    client.writer.write(b'{"execute": "flush", "arguments": {"name": "db"}, "id": 1}')
    await still_answers(server)
    host.events.put(HostEvent(HostEventName.VM_ADDED, "db"))
    assert (await client.take())["event"] == "VM_ADDED"
    host.gate.set()
    assert await client.take() == {"return": {"bytes": 12288}, "id": 1}


async def test_who_does_not_read_loses_events_and_is_told(
    server: ControlServer, host: Any, connect: Connect
) -> None:
    """The queue is bounded, what there was no room for is counted, and nobody else waits."""
    client = await connect(server)
    data = {"text": "x" * 1000}
    for _ in range(20):
        for _ in range(200):
            host.events.put(HostEvent(HostEventName.VM_STATE, "db", data))
        await still_answers(server)
    counts = {"VM_STATE": 0, "EVENTS_DROPPED": 0}
    while sum(counts.values()) < 4000:
        event = await client.take()
        counts[event["event"]] += event["data"].get("count", 1)
        if client.reader._buffer == b"" and counts["EVENTS_DROPPED"] == 0:
            host.events.put(HostEvent(HostEventName.VM_STATE, "db", data))
    assert counts["EVENTS_DROPPED"] > 0


async def test_who_never_reads_is_disconnected(tmp_path: Path, host: Any, connect: Connect) -> None:
    """Once its socket is full and patience is over, it costs nothing any more."""
    server = ControlServer(tmp_path / "c.sock", host, Limits(patience_s=0.05))
    await server.start()
    await connect(server)
    async with asyncio.timeout(20):
        while host.events:
            host.events.put(HostEvent(HostEventName.VM_STATE, "db", {"text": "x" * 10000}))
            await asyncio.sleep(0.001)
    await server.stop()


async def test_a_flood_of_commands_holds_up_nobody(server: ControlServer, connect: Connect) -> None:
    """A client that sends and never reads is served as fast as it reads, others at once."""
    client = await connect(server)
    client.writer.write(b'{"execute": "query-commands"}' * 2000)
    for _ in range(5):
        await still_answers(server)
    client.writer.transport.abort()


async def test_clients_are_limited(server: ControlServer, connect: Connect) -> None:
    """One too many is told so; when one leaves there is room again."""
    clients = [await connect(server) for _ in range(4)]
    refused = await connect(server, "new")
    assert "there are 4 clients; hint: " in (await refused.take())["error"]["desc"]
    assert await refused.take() == {"closed": True}
    await clients.pop().close()
    await until(lambda: len(server._tasks) < 4)
    await still_answers(server)


async def test_conversions_are_passed_on(
    server: ControlServer, host: Any, connect: Connect
) -> None:
    """After record-start a client gets each batch, byte for byte, until record-stop."""
    client = await connect(server)
    start = {"execute": "record-start", "arguments": {"name": "db"}}
    assert await client.ask(start) == {"return": {}}
    assert "hint" in (await client.ask(start))["error"]["desc"]
    records = np.zeros(3, RECORD)
    records["offset"] = [0, 4096, 8192]
    host.batches.put(Block(records, 2, 77))
    event = await client.take()
    assert (event["event"], event["data"]["vm"], event["data"]["at"]) == ("RECORDS", "db", 2)
    got = np.frombuffer(base64.b64decode(event["data"]["records"]), RECORD)
    assert (got == records).all()
    stop = {"execute": "record-stop", "arguments": {"name": "db"}}
    assert await client.ask(stop) == {"return": {}}
    assert (await client.take())["data"]["last"]
    assert not host.batches


async def test_a_client_that_leaves_leaves_nothing(
    server: ControlServer, host: Any, connect: Connect
) -> None:
    """Its subscriptions and tasks go with it, also when it was in the middle of a command."""
    tasks = len(asyncio.all_tasks())
    client = await connect(server)
    await client.ask({"execute": "record-start", "arguments": {"name": "db"}})
    assert host.events
    assert host.batches
    client.writer.write(b'{"execute": "flush", "argum')
    client.writer.transport.abort()
    await until(lambda: len(asyncio.all_tasks()) <= tasks)
    assert not host.events
    assert not host.batches


async def test_socket_is_private_from_its_birth(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mode 0600 as soon as bind() has made it, whatever the umask."""
    modes = []
    bind = socket.socket.bind

    def note(self: socket.socket, address: str) -> None:
        bind(self, address)
        modes.append(stat.S_IMODE(os.stat(address).st_mode))  # noqa: PTH116 - as bind() takes it

    monkeypatch.setattr(socket.socket, "bind", note)
    before = os.umask(0)
    try:
        server = ControlServer(tmp_path / "c.sock", host)
        await server.start()
    finally:
        os.umask(before)
    assert modes == [0o600]
    await server.stop()


async def test_a_socket_left_over_is_replaced(host: Any, tmp_path: Path) -> None:
    """One that nobody listens on is in nobody's way."""
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = ControlServer(path, host)
    await server.start()
    await still_answers(server)
    await server.stop()


async def test_a_live_daemon_is_not_replaced(server: ControlServer, host: Any) -> None:
    """The second gets an error with a hint, and the first goes on; after it, there is room."""
    second = ControlServer(server.path, host)
    with pytest.raises(ControlError, match="another daemon serves") as caught:
        await second.start()
    assert "[control] socket" in caught.value.hint
    await second.stop()
    await still_answers(server)
    await server.stop()
    await second.start()
    await still_answers(second)
    await second.stop()


async def test_what_else_is_there_is_left_alone(host: Any, tmp_path: Path) -> None:
    """Another program's socket, a file, and a directory that can't be made are errors."""
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ControlError, match="another program"):
            await ControlServer(path, host).start()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(ControlError, match="no socket"):
        await ControlServer(path, host).start()
    with pytest.raises(ControlError, match="cannot make"):
        await ControlServer(path / "c.sock", host).start()
    with pytest.raises(ControlError, match="cannot make"):
        await ControlServer(tmp_path / ("x" * 120), host).start()
    assert path.read_text() == "precious"


async def test_qmp_shell_works_on_it(server: ControlServer, tmp_path: Path) -> None:
    """QEMU's own shell connects, completes from query-commands, and runs commands."""
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("qmp-shell"),
        server.path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(os.environ, HOME=str(tmp_path)),
    )
    commands = b"query-vm name=db\nset-budget name=db budget=null\nquery-vm nom=db\n\n"
    async with asyncio.timeout(30):
        out, _ = await process.communicate(commands)
    text = out.decode()
    assert process.returncode == 0, text
    assert "Connected to QEMU 0." in text
    assert '"state": "attached"' in text
    assert '"error": {"class": "GenericError"' in text


async def test_a_group_may_have_the_socket(host: Any, tmp_path: Path) -> None:
    """Its members may connect; a group that is not there is an error that says so."""
    group = grp.getgrgid(os.getgid()).gr_name
    server = ControlServer(tmp_path / "control.sock", host, group=group)
    await server.start()
    found = server.path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getgid())
    await server.stop()
    with pytest.raises(ControlError, match="no-such-group"):
        await ControlServer(tmp_path / "other.sock", host, group="no-such-group").start()
