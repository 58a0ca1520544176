# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection to one QEMU: `qemu.qmp` with its memory bounded and every wait timed.

All methods run in the task of the VM's session; the library's reader and writer are tasks of their
own and only fill the queue of events.
"""

import asyncio
import logging
import resource
import socket
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError
from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message as WireMessage

from qmp_upm.credentials import Credentials, ReadCredentials, read_credentials
from qmp_upm.errors import (
    CommandError,
    ExcessError,
    LinkError,
    MessageError,
    PeerError,
    SilentError,
    TakenError,
)
from qmp_upm.limits import (
    EVENTS_MOST,
    FILES_KEPT,
    MESSAGE_BYTES_MOST,
    UNASKED_BYTES,
    UNASKED_MESSAGES,
    Allowance,
)
from qmp_upm.protocol import EVENTS, Event, read_message

CONNECT_SECONDS = 5.0
EXECUTE_SECONDS = 10.0
CLOSE_SECONDS = 1.0
YIELD_EVERY = 16
"""Messages after which the reader lets others run: it does not wait while it has data."""

# Why a session may end: RecursionError is JSON nested too deep.
_BROKEN = (QMPError, OSError, EOFError, ValueError, RecursionError, MessageError)

Item = TypeVar("Item")

_NAMES = TypeAdapter(list[dict[str, Any]])

# It warns of each reply that came after its time-out, which is ours to judge.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class EventQueue(EventListener, Generic[Item]):
    """A bounded queue, and no history: the library's has no end.

    ``read`` makes of an event what is kept of it, or None. What it raises ends the connection.
    """

    def __init__(self, read: Callable[[WireMessage], Item | None]) -> None:
        super().__init__()
        self._read = read
        self.arrived = asyncio.Event()
        self.kept: deque[Item] = deque()
        self.dropped = 0

    async def put(self, event: WireMessage) -> None:
        """Keep it, or count it as dropped. Called by the library."""
        item = self._read(event)
        if item is None:
            return
        if len(self.kept) == EVENTS_MOST:
            self.dropped += 1
        else:
            self.kept.append(item)
        self.arrived.set()

    def accept(self, _event: WireMessage) -> bool:
        """The queue itself decides."""
        return True


class BoundedClient(QMPClient):
    """The library's client without its log of every message, and fair to other tasks."""

    _received = 0

    def __init__(self, events: EventQueue[Any], message_bytes_most: int = 10 << 20) -> None:
        super().__init__(readbuflen=message_bytes_most)
        # The default listener can't be removed: it is made to keep nothing.
        self.events.event_filter = lambda _event: False
        self.register_listener(events)
        self._wake = events.arrived

    def abort(self) -> None:
        """Close the connection without sending what is queued."""
        if self._writer is not None:
            self._writer.transport.abort()

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
        # All of ours are strings; the library looks up whatever it gets, hashable or not.
        if not isinstance(msg.get("id", ""), str):
            raise ValueError("a reply has an id that is not ours")  # noqa: TRY004 - of the peer
        await super()._on_message(msg)
        self._received += 1
        if self._received % YIELD_EVERY == 0:
            await asyncio.sleep(0)


class _QemuClient(BoundedClient):
    """A client of a peer that is not trusted. ``received_bytes``: all that it has sent."""

    def __init__(self, events: EventQueue[Any], message_bytes_most: int) -> None:
        super().__init__(events, message_bytes_most)
        self.received_bytes = 0
        self._line_bytes = 0
        self._messages, self._bytes = Allowance(UNASKED_MESSAGES), Allowance(UNASKED_BYTES)

    async def _readline(self) -> bytes:
        line: bytes = await super()._readline()
        if not line.endswith(b"\n"):
            raise EOFError  # QEMU was killed in mid-sentence: that is no fault of its words
        self._line_bytes = len(line)
        self.received_bytes += len(line)
        return line

    async def _on_message(self, msg: WireMessage) -> None:
        if "event" in msg or str(msg.get("id")) not in self._pending:
            self._charge()
        await super()._on_message(msg)

    def _charge(self) -> None:
        """Nobody asked for this message."""
        enough = self._messages.take(1), self._bytes.take(self._line_bytes)
        if not all(enough):
            raise ExcessError(
                f"QEMU sends more than {UNASKED_MESSAGES} messages or {UNASKED_BYTES >> 10} KiB "
                "a second that nobody asked for",
                hint="look what is the matter with the guest; the VM is tried again later",
            )


def _plugin_event(event: WireMessage) -> Event | None:
    """What the plugin says, read when it comes: what waits is small, whatever was sent."""
    name = str(event["event"])
    return (
        Event(name, read_message(EVENTS[name], event.get("data", {}))) if name in EVENTS else None
    )


class Monitor:
    """A QMP session with one QEMU. Raises LinkError, MessageError or CommandError, nothing else."""

    def __init__(
        self, socket_path: str, read_credentials: ReadCredentials = read_credentials
    ) -> None:
        self.socket_path = socket_path
        self.peer = Credentials(0, 0)
        self._read_credentials = read_credentials
        self._link: socket.socket | None = None
        self._events = EventQueue(_plugin_event)
        self._client = _QemuClient(self._events, MESSAGE_BYTES_MOST)
        self._oob = False
        self.nobody = False
        """Whether nobody listens there."""

    async def connect(self) -> None:
        """Connect and negotiate.

        TakenError if nobody greets, SilentError if that is because QEMU is stopped, LinkError if
        there is nobody.
        """
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._client.connect(await self._open())
        except TimeoutError as error:
            if _is_stopped(self.peer.process):
                raise SilentError(
                    f"QEMU, process {self.peer.process}, is stopped",
                    hint=f"somebody sent it SIGSTOP, or debugs it: kill -CONT {self.peer.process}",
                ) from error
            raise self._taken() from error
        except _BROKEN as error:
            if not isinstance(_innermost(error), OSError | EOFError):
                raise _garbage(error) from error
            self.nobody = isinstance(_innermost(error), ConnectionRefusedError | FileNotFoundError)
            raise LinkError(
                f"cannot connect to {self.socket_path}: {_cause(error)}",
                hint="check that the VM runs, that its monitor listens there, and the permissions "
                "of the socket",
            ) from error
        greeting = self._client.greeting
        self._oob = greeting is not None and "oob" in greeting.QMP.capabilities

    async def _open(self) -> socket.socket:
        """A connected socket. OSError if there is nobody, TakenError if the queue is full."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._link = link
        # Descriptors are given out from the lowest on.
        if link.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FILES_KEPT:
            raise LinkError(
                "the daemon has no file descriptors left for this VM",
                hint="raise the limit, LimitNOFILE= of its unit; others are served on",
            )
        try:
            # asyncio takes the EAGAIN of a full queue for a connection on its way (unix(7)).
            link.connect(self.socket_path)
            self.peer = self._read_credentials(link)
        except BlockingIOError as error:
            raise self._taken() from error
        return link

    def _taken(self) -> TakenError:
        return TakenError(
            f"{self.socket_path} accepts connections but does not answer",
            hint="another client may hold this monitor: give qmp-upm one of its own",
        )

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
            raise SilentError(
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
        """Events of ours that came, at the latest after so long; empty if none did.

        LinkError if the connection broke.
        """
        if not self._events.kept and seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await self._events.arrived.wait()
            except TimeoutError:
                pass
        if self._client.runstate is not Runstate.RUNNING:
            raise LinkError("QEMU closed the connection", hint="it is made again by itself")
        self._events.arrived.clear()
        events = list(self._events.kept)
        self._events.kept.clear()
        return events

    def wake(self) -> None:
        """Have wait_events return at once: there is something else to do."""
        self._events.arrived.set()

    def take_dropped_events(self) -> int:
        """How many events there was no room for since the last call."""
        dropped, self._events.dropped = self._events.dropped, 0
        return dropped

    async def close(self) -> PeerError | None:
        """Disconnect. Returns why the session had broken, if it had.

        A peer that does not take what is still to be sent to it is cut off.
        """
        closing = asyncio.create_task(self._client.disconnect())
        closing.add_done_callback(_retrieve)  # also if nobody waits for it any more
        try:
            done, _ = await asyncio.wait((closing,), timeout=CLOSE_SECONDS)
            if not done:
                self._client.abort()
                done, _ = await asyncio.wait((closing,), timeout=CLOSE_SECONDS)
            if not done:
                closing.cancel()
                return LinkError("the connection did not close in time", hint="it is made again")
            closing.result()
        except _BROKEN as error:
            if isinstance(_innermost(error), OSError | EOFError):
                return LinkError(_cause(error), hint="it is made again by itself")
            return _garbage(error)
        finally:
            if self._link is not None:
                self._link.close()  # a connect that was interrupted leaves it open
        return None


def _is_stopped(process: int) -> bool:
    """Whether it is, as proc_pid_stat(5) has it; of a process that is not there: no."""
    try:
        line = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return line.rpartition(")")[2].split()[0] in ("T", "t")


def _retrieve(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        task.exception()


def _innermost(error: BaseException) -> BaseException:
    """The reason: the library wraps what the socket or the parser said."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _cause(error: BaseException) -> str:
    reason = _innermost(error)
    if isinstance(reason, EOFError):
        return "QEMU closed the connection"
    return str(reason) or type(reason).__name__


def _garbage(error: BaseException) -> MessageError:
    if isinstance(error, MessageError):
        return error
    return MessageError(
        f"this is no QMP: {_cause(error)[:200]}",
        hint="check that the socket is a QMP monitor of QEMU; restart the VM if it is",
    )
