# SPDX-License-Identifier: GPL-2.0-or-later
"""What a fake peer may do wrong with one message that it should send.

A plan is any function that is given the name of what comes next (a command about to be answered,
``greeting``, or an event) and returns a fault or None. ``Script`` is one written beforehand.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

BLOCK_BYTES = 1 << 16


class Fault(ABC):
    """One way to send a message badly."""

    @abstractmethod
    async def send(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        """Send what is left of ``line``. ConnectionError if the other side has gone."""


Plan = Callable[[str], Fault | None]


@dataclass(frozen=True)
class Delay(Fault):
    """Whole, but only after ``seconds``; what follows waits too."""

    seconds: float

    async def send(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        """Wait, then send."""
        await asyncio.sleep(self.seconds)
        writer.write(line)


@dataclass(frozen=True)
class Drop(Fault):
    """Never sent."""

    async def send(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        """Send nothing."""


@dataclass(frozen=True)
class Garbage(Fault):
    """``data`` instead of the message, byte for byte."""

    data: bytes

    async def send(self, line: bytes, writer: asyncio.StreamWriter) -> None:  # noqa: ARG002
        """Send the garbage, in blocks that the other side has to take."""
        for at in range(0, len(self.data), BLOCK_BYTES):
            writer.write(self.data[at : at + BLOCK_BYTES])
            await writer.drain()


@dataclass(frozen=True)
class Split(Fault):
    """Whole, in pieces of so many bytes, each in a write of its own."""

    size: int = 1

    async def send(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        """Send piece by piece; others run between two."""
        for at in range(0, len(line), self.size):
            writer.write(line[at : at + self.size])
            await asyncio.sleep(0)


@dataclass(frozen=True)
class GiantLine(Fault):
    """A string of so many bytes, without a line's end unless ``ended``, instead of the message."""

    size: int
    ended: bool = True

    async def send(self, line: bytes, writer: asyncio.StreamWriter) -> None:  # noqa: ARG002
        """Send it in blocks, as long as they are taken."""
        writer.write(b'{"return": "')
        for at in range(0, self.size, BLOCK_BYTES):
            writer.write(b"x" * min(BLOCK_BYTES, self.size - at))
            await writer.drain()
        if self.ended:
            writer.write(b'"}\r\n')


@dataclass(frozen=True)
class Flood(Fault):
    """The message behind ``count`` times ``line``."""

    count: int
    line: bytes

    async def send(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        """Send the flood in blocks, then the message."""
        block = max(1, BLOCK_BYTES // len(self.line))
        for at in range(0, self.count, block):
            writer.write(self.line * min(block, self.count - at))
            await writer.drain()
        writer.write(line)


@dataclass(frozen=True)
class Close(Fault):
    """The first ``after`` bytes of the message, then the connection's end."""

    after: int = 0

    async def send(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        """Send them and close."""
        writer.write(line[: self.after])
        await writer.drain()
        writer.close()


class Script:
    """A plan written beforehand: faults by what they hit, each used once, in order."""

    def __init__(self) -> None:
        self._faults: defaultdict[str, deque[Fault | None]] = defaultdict(deque)

    def add(self, what: str, *faults: Fault | None) -> None:
        """The next messages of this name meet these; None is one that goes well."""
        self._faults[what] += faults

    def __call__(self, what: str) -> Fault | None:
        """The next fault for it."""
        waiting = self._faults[what]
        return waiting.popleft() if waiting else None

    @property
    def waiting(self) -> int:
        """How many have not been met."""
        return sum(len(faults) for faults in self._faults.values())
