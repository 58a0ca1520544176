# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of the control socket, for the command line: answers, events, or a ControlError."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPError, Runstate
from qemu.qmp.message import Message

from qmp_upm.errors import ControlError
from qmp_upm.qmp import BoundedClient, EventQueue

CONNECT_SECONDS = 5.0
EXECUTE_SECONDS = 120.0
"""Longer than the daemon itself takes for anything; a flush of much memory is slow."""


class _Client(BoundedClient):
    """Remembers the error that a daemon sends in place of its greeting."""

    refusal: str | None = None

    def _cb_inbound(self, msg: Message) -> Message:
        if self.runstate is Runstate.CONNECTING and isinstance(error := msg.get("error"), dict):
            self.refusal = str(error.get("desc"))
        return msg


class ControlClient:
    """A session with the daemon; `connect` makes one."""

    def __init__(self, client: BoundedClient, queue: EventQueue[Message]) -> None:
        self._client, self._queue = client, queue

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What the command returns."""
        try:
            async with asyncio.timeout(EXECUTE_SECONDS):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise _refused(error.error.error.desc) from error
        except TimeoutError as error:
            raise ControlError(
                f"the daemon did not answer {command} within {EXECUTE_SECONDS:.0f} s",
                hint="look at its log",
            ) from error
        except (ExecInterruptedError, QMPError, OSError) as error:
            raise _gone() from error

    async def events(self) -> AsyncIterator[Mapping[str, Any]]:
        """Events in their order, from the connection on; ControlError once the daemon ends."""
        while True:
            while self._queue.kept:
                yield dict(self._queue.kept.popleft())
            if self._queue.dropped:
                yield {"event": "EVENTS_DROPPED", "data": {"count": self._queue.dropped}}
                self._queue.dropped = 0
            if self._client.runstate is not Runstate.RUNNING:
                raise _gone()
            self._queue.arrived.clear()
            await self._queue.arrived.wait()


@asynccontextmanager
async def connect(path: Path) -> AsyncIterator[ControlClient]:
    """A session with the daemon at this socket."""
    queue = EventQueue(lambda event: event)
    client = _Client(queue)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await client.connect(str(path))
    except TimeoutError as error:
        raise ControlError(
            f"the daemon at {path} does not answer",
            hint="it may be stopped or hung: systemctl status qmp-upm",
        ) from error
    except (QMPError, OSError, EOFError, ValueError) as error:
        raise _unreachable(path, client.refusal, _innermost(error)) from error
    try:
        yield ControlClient(client, queue)
    finally:
        # Why it broke has been said by what met it first.
        with suppress(QMPError, OSError, EOFError, ValueError):
            await client.disconnect()


def ask(path: Path, command: str, arguments: Mapping[str, object] | None = None) -> Any:
    """One command on a connection of its own."""

    async def run() -> Any:
        async with connect(path) as client:
            return await client.execute(command, arguments)

    return asyncio.run(run())


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _refused(desc: str) -> ControlError:
    message, _, hint = desc.partition("; hint: ")
    return ControlError(message, hint=hint or "see the daemon's log")


def _gone() -> ControlError:
    return ControlError(
        "the daemon closed the connection", hint="it has ended, or see its log for why"
    )


def _unreachable(path: Path, refusal: str | None, cause: BaseException) -> ControlError:
    if refusal is not None:
        return _refused(refusal)
    if isinstance(cause, FileNotFoundError | ConnectionRefusedError):
        return ControlError(
            f"no daemon runs at {path}",
            hint="start it with 'qmp-upm run', or name its socket with --socket",
        )
    if isinstance(cause, PermissionError):
        return ControlError(
            f"{path} may not be opened by this user",
            hint="run it with sudo, or as a member of the group that [control] group names",
        )
    if isinstance(cause, EOFError):
        return _gone()
    return ControlError(
        f"{path} is no control socket: {str(cause) or type(cause).__name__}",
        hint="name the socket that the configuration has under [control]",
    )
