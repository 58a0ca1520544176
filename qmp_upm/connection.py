# SPDX-License-Identifier: GPL-2.0-or-later
"""One QMP client of the daemon: greeting, negotiation, its commands in their order, and events.

A client costs a bounded share of the daemon whatever it sends or fails to read: a message has a
greatest length, an answer is written before the next command is read, events wait in queues that
drop and count, and who does not go on within ``patience_s`` is disconnected. Two kinds of task run
here: the one that reads and answers, and a relay for each stream of events.

Built on asyncio's streams: `qemu.qmp.AsyncProtocol` reads line by line, where QMP clients send no
line breaks, and queues what it sends without a bound.
"""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

from qmp_upm.commands import execute, version
from qmp_upm.errors import ControlError, QmpUpmError, UnknownCommandError, UnknownVmError
from qmp_upm.events import HostEvent, Subscription
from qmp_upm.framing import Framer, TooLongError
from qmp_upm.host import Host
from qmp_upm.recording import EVENT, Sender
from qmp_upm.trace import Block

READ_BYTES = 1 << 16

log = structlog.get_logger()


@dataclass(frozen=True)
class Limits:
    """What clients may cost the daemon."""

    clients: int = 32
    message_bytes: int = 1 << 16
    patience_s: float = 30.0
    """For negotiation, for the rest of a message, and for taking what is sent."""


class _Request(BaseModel):
    """A command as QEMU's docs/interop/qmp-spec.rst has it; ``exec-oob`` is not offered."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    execute: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    id: Any = None


def _failure(error: QmpUpmError) -> dict[str, object]:
    kind = "GenericError"
    if isinstance(error, UnknownCommandError):
        kind = "CommandNotFound"
    elif isinstance(error, UnknownVmError):
        kind = "DeviceNotFound"
    return {"error": {"class": kind, "desc": f"{error.message}; hint: {error.hint}"}}


def _event(event: HostEvent) -> tuple[str, Mapping[str, object]]:
    return event.name, {"vm": event.vm, **event.data} if event.vm else event.data


def refuse(writer: asyncio.StreamWriter, error: QmpUpmError) -> None:
    """Say why in place of a greeting, and close. Does not wait."""
    writer.write(_encode(_failure(error)))
    writer.close()


class Connection:
    """A client, from its greeting until it leaves."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: Host,
        limits: Limits,
    ) -> None:
        self.host = host
        self._reader, self._writer, self._limits = reader, writer, limits
        self._negotiated = False
        self._tasks: asyncio.TaskGroup
        self._relays: list[asyncio.Task[None]] = []
        self._records: dict[str, Subscription[Block]] = {}
        peer = writer.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        self._pid, self._uid, _ = struct.unpack("3i", peer)

    async def serve(self) -> None:
        """Until the client leaves, sends what is no message, or stops reading.

        Whoever runs this aborts the transport afterwards.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._converse()
                for relay in self._relays:
                    relay.cancel()
            self._writer.close()
            async with asyncio.timeout(self._limits.patience_s):
                await self._writer.wait_closed()
        except* (OSError, TimeoutError) as lost:
            log.info(
                "control-client-lost",
                pid=self._pid,
                uid=self._uid,
                error=repr(lost.exceptions[0]),
                hint="it left in the middle of an answer, or did not read",
            )

    async def _converse(self) -> None:
        framer = Framer(self._limits.message_bytes)
        await self._send({"QMP": {"version": version(), "capabilities": []}})
        while data := await self._read(framer):
            try:
                for text in framer.feed(data):
                    await self._write(await self._answer(text))
                    # Neither reading nor writing waits while there is data and room.
                    await asyncio.sleep(0)
            except TooLongError as error:
                await self._send(
                    _failure(ControlError(str(error), hint="the connection ends here"))
                )
                return

    async def _read(self, framer: Framer) -> bytes:
        endless = self._negotiated and not framer.pending
        try:
            async with asyncio.timeout(None if endless else self._limits.patience_s):
                return await self._reader.read(READ_BYTES)
        except TimeoutError:
            error = ControlError(
                f"nothing came for {self._limits.patience_s:g} s",
                hint="negotiate with qmp_capabilities, and end the commands that you begin",
            )
            await self._send(_failure(error))
            return b""

    async def _send(self, message: Mapping[str, object]) -> None:
        await self._write(_encode(message))

    async def _write(self, message: bytes) -> None:
        self._writer.write(message)
        async with asyncio.timeout(self._limits.patience_s):
            await self._writer.drain()

    async def _answer(self, text: bytes) -> bytes:
        tag: dict[str, object] = {}
        try:
            request = _read_request(text, tag)
            return _encode({"return": await self._execute(request)} | tag)
        except QmpUpmError as error:
            return _encode(_failure(error) | tag)
        except Exception:  # a defect costs one answer, not the connection
            log.exception("control-command-died", text=text[:256], hint="report this")
            return _encode(_failure(ControlError("internal error", hint="see the log")) | tag)

    async def _execute(self, request: _Request) -> object:
        if request.execute == "qmp_capabilities":
            return self._negotiate(request.arguments)
        if not self._negotiated:
            raise UnknownCommandError(
                f"{request.execute[:64]} before the negotiation of capabilities",
                hint="begin with qmp_capabilities",
            )
        if not request.execute.startswith("query-"):
            log.info("control", command=request.execute[:64], pid=self._pid, uid=self._uid)
        return await execute(self, request.execute, request.arguments)

    def _negotiate(self, arguments: Mapping[str, object]) -> object:
        if self._negotiated:
            raise UnknownCommandError(
                "capabilities have been negotiated", hint="go on with other commands"
            )
        if arguments not in ({}, {"enable": []}):
            raise ControlError("there are no capabilities to enable", hint="leave them out")
        self._negotiated = True
        # Clients expect the answer first: the relay runs after it was written.
        self._relay(self._send_events(self.host.subscribe()))
        return {}

    def start_record(self, name: str) -> None:
        """Send the conversions of a VM to this client from now on."""
        if name in self._records:
            raise ControlError(f"{name} is being recorded", hint="one record a client and VM")
        self._records[name] = self.host.record(name)
        self._relay(self._send_records(name, self._records[name]))

    def stop_record(self, name: str) -> None:
        """Send no more of them."""
        if name not in self._records:
            raise ControlError(f"{name} is not being recorded", hint="record-start starts")
        self._records.pop(name).close()

    def _relay(self, sending: Coroutine[None, None, None]) -> None:
        self._relays.append(self._tasks.create_task(sending))

    async def _send_events(self, subscription: Subscription[HostEvent]) -> None:
        told = 0
        try:
            async for event in subscription:
                if subscription.dropped > told:
                    await self._send_event("EVENTS_DROPPED", {"count": subscription.dropped - told})
                    told = subscription.dropped
                await self._send_event(*_event(event))
        finally:
            subscription.close()

    async def _send_records(self, name: str, subscription: Subscription[Block]) -> None:
        sender, told = Sender(name), 0
        try:
            async for block in subscription:
                lost, told = subscription.dropped - told, subscription.dropped
                for chunk in sender.chunks(block, lost):
                    await self._send_event(EVENT, chunk)
            await self._send_event(EVENT, sender.last(subscription.dropped - told))
        finally:
            subscription.close()
            # The VM may be gone, and another come with its name.
            if self._records.get(name) is subscription:
                del self._records[name]

    async def _send_event(self, name: str, data: Mapping[str, object]) -> None:
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        timestamp = {"seconds": seconds, "microseconds": microseconds}
        await self._send({"timestamp": timestamp, "event": name, "data": data})


def _encode(message: Mapping[str, object]) -> bytes:
    try:
        text = to_json(message, inf_nan_mode="null")
    except PydanticSerializationError:
        # A VM's QEMU may have sent half a surrogate pair. JSON can name that, UTF-8 can't.
        text = json.dumps(to_jsonable_python(message, inf_nan_mode="null")).encode()
    return text + b"\r\n"


def _read_request(text: bytes, tag: dict[str, object]) -> _Request:
    """The command in ``text``; its ``id`` goes to ``tag`` even if the rest is wrong."""
    try:
        tree = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ControlError(f"no JSON: {error}", hint="send JSON objects") from error
    if isinstance(tree, dict) and "id" in tree:
        tag["id"] = tree["id"]
    try:
        return _Request.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:1]) or "the message"
        raise ControlError(
            f"{where}: {first['msg']}", hint="send execute, and if need be arguments and id"
        ) from error
