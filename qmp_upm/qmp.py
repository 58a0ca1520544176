# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection to one QEMU: `qemu.qmp` with its memory bounded and every wait timed.

All methods run in the task of the VM's session; the library's reader and writer are tasks of their
own and only fill the queue of events.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message as WireMessage

from qmp_upm.errors import CommandError, LinkError, MessageError
from qmp_upm.protocol import Event, read_message

CONNECT_SECONDS = 5.0
EXECUTE_SECONDS = 10.0
EVENTS_MOST = 1024
"""Events kept for the session; more are dropped and make it read everything again."""
YIELD_EVERY = 64
"""Messages after which the reader lets others run: it does not wait while it has data."""

# Why a session may end: RecursionError is JSON nested too deep.
_BROKEN = (QMPError, OSError, EOFError, ValueError, RecursionError)

_NAMES = TypeAdapter(list[dict[str, Any]])

# It warns of each reply that came after its time-out, which is ours to judge.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class EventQueue(EventListener):
    """A bounded queue of the events whose names begin so; no history: the library's has no end."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self.arrived = asyncio.Event()
        self.kept: deque[WireMessage] = deque()
        self.dropped = 0

    async def put(self, event: WireMessage) -> None:
        """Called by the library for every event; never waits."""
        if not self.accept(event):
            return
        if len(self.kept) == EVENTS_MOST:
            self.dropped += 1
        else:
            self.kept.append(event)
        self.arrived.set()

    def accept(self, event: WireMessage) -> bool:
        """Whether it is one of those that are wanted."""
        return str(event["event"]).startswith(self._prefix)


class BoundedClient(QMPClient):
    """The library's client without its log of every message, and fair to other tasks."""

    _received = 0

    def __init__(self, events: EventQueue) -> None:
        super().__init__()
        # The default listener can't be removed: it is made to keep nothing.
        self.events.event_filter = lambda _event: False
        self.register_listener(events)
        self._wake = events.arrived

    def _cb_inbound(self, msg: WireMessage) -> WireMessage:
        return msg

    def _cb_outbound(self, msg: WireMessage) -> WireMessage:
        return msg

    async def _bh_disconnect(self) -> None:
        try:
            await super()._bh_disconnect()
        finally:
            self._wake.set()

    async def _on_message(self, msg: WireMessage) -> None:
        await super()._on_message(msg)
        self._received += 1
        if self._received % YIELD_EVERY == 0:
            await asyncio.sleep(0)


class Monitor:
    """A QMP session with one QEMU. Raises LinkError, MessageError or CommandError, nothing else."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self._events = EventQueue("X_UPM_")
        self._client = BoundedClient(self._events)
        self._oob = False

    async def connect(self) -> None:
        """Connect and negotiate. LinkError if nobody listens or answers within the time."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._client.connect(self.socket_path)
        except TimeoutError as error:
            raise LinkError(
                f"{self.socket_path} accepts connections but does not answer",
                hint="another client may hold this monitor: give qmp-upm one of its own",
            ) from error
        except _BROKEN as error:
            raise LinkError(
                f"cannot connect to {self.socket_path}: {_cause(error)}",
                hint="check that the VM runs, that its monitor listens there, and the permissions "
                "of the socket",
            ) from error
        greeting = self._client.greeting
        self._oob = greeting is not None and "oob" in greeting.QMP.capabilities

    @property
    def qemu_version(self) -> str:
        """As in the greeting, ``10.0.2``; ``unknown`` if it says none."""
        greeting = self._client.greeting
        version = greeting.QMP.version.get("qemu") if greeting else None
        if not isinstance(version, Mapping):
            return "unknown"
        return ".".join(str(version.get(part, "?"))[:8] for part in ("major", "minor", "micro"))

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, oob: bool = True
    ) -> object:
        """The command's return value. Ours run out of band where QEMU offers that."""
        try:
            async with asyncio.timeout(EXECUTE_SECONDS):
                return await self._client.execute(
                    command, None if arguments is None else dict(arguments), oob and self._oob
                )
        except TimeoutError as error:
            raise LinkError(
                f"no answer to {command} within {EXECUTE_SECONDS:.0f} s",
                hint="QEMU may be stopped or hung; it is tried again",
            ) from error
        except ExecuteError as error:
            raise CommandError(f"{command}: {error}", hint="see the message of QEMU") from error
        except (ExecInterruptedError, QMPError, OSError) as error:
            raise LinkError(
                f"the connection broke during {command}", hint="it is made again by itself"
            ) from error

    async def command_names(self) -> frozenset[str]:
        """What query-commands lists."""
        answer = await self.execute("query-commands", oob=False)
        try:
            return frozenset(str(line["name"]) for line in _NAMES.validate_python(answer))
        except (ValidationError, KeyError) as error:
            raise MessageError(
                "query-commands gave no list of commands",
                hint="check that the socket is a QMP monitor of QEMU",
            ) from error

    async def wait_events(self, seconds: float) -> list[Event]:
        """Events of ours that came, at the latest after so long; empty if none did."""
        if not self._events.kept and seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await self._events.arrived.wait()
            except TimeoutError:
                pass
        if self._client.runstate is not Runstate.RUNNING:
            raise LinkError("QEMU closed the connection", hint="it is made again by itself")
        self._events.arrived.clear()
        wire, self._events.kept = self._events.kept, deque()
        return [read_message(Event, dict(event)) for event in wire]

    def take_dropped_events(self) -> int:
        """How many events there was no room for since the last call."""
        dropped, self._events.dropped = self._events.dropped, 0
        return dropped

    async def close(self) -> str | None:
        """Disconnect. Returns why the session had broken, if it had."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._client.disconnect()
        except TimeoutError:
            return "the connection did not close in time"
        except _BROKEN as error:
            return _cause(error)
        return None


def _cause(error: BaseException) -> str:
    """The innermost reason: the library wraps what the socket said."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, EOFError):
        return "QEMU closed the connection"
    return str(error) or type(error).__name__
