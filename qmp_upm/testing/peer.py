# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP monitor that is made of one function, as ``httpx.MockTransport`` is a server made of one.

::

    async with FakeQemu(lambda command, arguments: {}).listening("/tmp/guest.monitor") as peer:
        ...
"""

import asyncio
import contextlib
import json
import os
import socket
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Self

from qmp_upm.framing import Framer, TooLongError
from qmp_upm.testing.faults import Fault, Plan

READ_BYTES = 1 << 16
ASKED_MOST = 10_000
BACKLOG = 100
"""Connections that wait to be accepted, as in asyncio."""
MESSAGE_BYTES_MOST = 64 << 20
"""Where QEMU gives up on a message, too."""

Handler = Callable[[str, Mapping[str, Any]], object]


class ReplyError(Exception):
    """What a handler raises to answer with an error of this class and text."""

    def __init__(self, description: str, *, kind: str = "GenericError") -> None:
        super().__init__(description)
        self.description = description
        self.kind = kind


def encode(message: object) -> bytes:
    """A message as QEMU writes it."""
    return json.dumps(message).encode() + b"\r\n"


class FakeQemu:
    """Serves one client at a time, as a monitor does; the next one waits for its greeting.

    ``handler(command, arguments)`` returns what the command returns, or raises ReplyError. What is
    in ``replies`` for a command is used first, once each: values, ReplyErrors, or functions of the
    arguments. ``plan`` says what goes wrong. ``asked`` are the last commands with their arguments,
    ``counts`` how often each came, ``connections`` how often somebody was greeted.
    ``own_process``: False for one that shares the test's process with others.
    """

    def __init__(self, handler: Handler, plan: Plan | None = None) -> None:
        self.handler = handler
        self.plan = plan
        self.replies: defaultdict[str, deque[object]] = defaultdict(deque)
        self.asked: deque[tuple[str, Mapping[str, Any]]] = deque(maxlen=ASKED_MOST)
        self.counts: Counter[str] = Counter()
        self.connections = 0
        self.own_process = True
        self.greeting: object = {
            "QMP": {
                "version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""},
                "capabilities": ["oob"],
            }
        }
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._link: _Link | None = None

    @contextlib.asynccontextmanager
    async def listening(self, path: str | Path) -> AsyncIterator[Self]:
        """Listen on a UNIX socket; at the end hang up, and remove the socket.

        To whoever connects it is a process of its own, as QEMU is.
        """
        listener = listen_as_another(path) if self.own_process else None
        server = await (
            asyncio.start_unix_server(self._accept, str(path))
            if listener is None
            else asyncio.start_unix_server(self._accept, sock=listener)
        )
        try:
            yield self
        finally:
            server.close()
            await self.hang_up()
            Path(path).unlink(missing_ok=True)  # noqa: ASYNC240 - a socket of our own

    async def hang_up(self) -> None:
        """Close all connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def emit(self, event: str, data: Mapping[str, Any]) -> None:
        """Send an event to the client, if there is one that is past its negotiation."""
        if self._link is not None and self._link.ready:
            stamp = {"seconds": 0, "microseconds": 0}
            self._link.send(event, {"timestamp": stamp, "event": event, "data": data})

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - start_unix_server makes one
        self._tasks.add(task)
        try:
            async with self._turn:
                await self._serve(reader, writer)
        except (asyncio.CancelledError, ConnectionError, TooLongError):
            pass  # told to hang up, or the client did, or sends what QEMU would not take
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        framer = Framer(MESSAGE_BYTES_MOST)
        self._link = link = _Link(writer, self.plan)
        try:
            link.send("greeting", self.greeting)
            while data := await reader.read(READ_BYTES):
                for text in framer.feed(data):
                    link.send(*self._answer(text, link))
                await link.drain()
        finally:
            self._link = None
            await link.stop()

    def _answer(self, text: bytes, link: "_Link") -> tuple[str, dict[str, Any]]:
        try:
            request = json.loads(text)
        except (ValueError, RecursionError):
            return "error", _error("GenericError", "JSON parse error")
        if not isinstance(request, dict):
            return "error", _error("GenericError", "QMP input must be a JSON object")
        same_id = {"id": request["id"]} if "id" in request else {}
        command = request.get("execute", request.get("exec-oob"))
        if not isinstance(command, str):
            return "error", _error("GenericError", "QMP input lacks member 'execute'") | same_id
        arguments = request.get("arguments", {})
        self.asked.append((command, arguments))
        self.counts[command] += 1
        try:
            return command, {"return": self._reply(command, arguments, link)} | same_id
        except ReplyError as refusal:
            return command, _error(refusal.kind, refusal.description) | same_id

    def _reply(self, command: str, arguments: Mapping[str, Any], link: "_Link") -> object:
        if self.replies[command]:
            reply = self.replies[command].popleft()
            if isinstance(reply, ReplyError):
                raise reply
            return reply(arguments) if callable(reply) else reply
        if command == "qmp_capabilities":
            link.ready = True
            return {}
        if not link.ready:
            raise ReplyError(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
                kind="CommandNotFound",
            )
        return self.handler(command, arguments)


class _Listening(socket.socket):
    """One that listens already: a second listen(2) would make this process the peer."""

    def listen(self, _backlog: int = 0, /) -> None:
        """Nothing is left to do."""


def listen_as_another(path: str | Path) -> socket.socket:
    """A socket that listens at ``path`` for a process that has ended.

    SO_PEERCRED names the process that called listen(2): a child does, for its parent.
    """
    listener = _Listening(socket.AF_UNIX, socket.SOCK_STREAM)
    Path(path).unlink(missing_ok=True)
    listener.bind(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        socket.socket.listen(listener, BACKLOG)
        os._exit(0)
    os.waitpid(child, 0)
    return listener


def _error(kind: str, description: str) -> dict[str, Any]:
    return {"error": {"class": kind, "desc": description}}


class _Link:
    """One connection's way out: messages in their order, each with what the plan does to it."""

    def __init__(self, writer: asyncio.StreamWriter, plan: Plan | None) -> None:
        self.ready = False
        self._writer = writer
        self._plan = plan
        self._waiting: deque[tuple[bytes, Fault | None]] = deque()
        self._task: asyncio.Task[None] | None = None

    def send(self, what: str, message: object) -> None:
        """Send now, or behind a message that meets a fault."""
        fault = self._plan(what) if self._plan else None
        if fault is None and not self._waiting and self._task is None:
            self._writer.write(encode(message))
            return
        self._waiting.append((encode(message), fault))
        if self._task is None:
            self._task = asyncio.create_task(self._send_waiting())

    async def _send_waiting(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client went: the reader sees that, too
            while self._waiting:
                line, fault = self._waiting.popleft()
                if fault is None:
                    self._writer.write(line)
                else:
                    await fault.send(line, self._writer)
        self._task = None

    async def drain(self) -> None:
        """Wait until the client takes what it is sent."""
        await self._writer.drain()

    async def stop(self) -> None:
        """Drop what waits."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
