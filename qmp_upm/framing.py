# SPDX-License-Identifier: GPL-2.0-or-later
"""Cuts a stream of JSON into its messages: QMP clients need not end them with a line break.

It only finds where a message ends; whether it is JSON is for a parser to say. What can be no
message is cut at the end of its line, so that one broken line does not cost those after it.
"""

import re
from collections.abc import Iterator

_MARKS = re.compile(rb'["\\{}\[\]\n]')


class TooLongError(ValueError):
    """A message is longer than agreed: the stream can't be followed any more."""


class Framer:
    """Bytes in, texts of messages out. Holds ``most_bytes`` and the last piece fed, at most."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._quoted = False

    @property
    def pending(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that ``data`` completes, to be taken all; TooLongError after the last."""
        self._buffer += data
        while (end := self._end()) is not None:
            if end > self._most_bytes:
                break
            text = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._scanned, self._depth, self._quoted = 0, 0, False
            yield text
        if len(self._buffer) > self._most_bytes:
            raise TooLongError(f"a message is longer than {self._most_bytes} bytes")

    def _end(self) -> int | None:
        """Where the first message ends; None if it has not come to its end."""
        buffer = self._buffer
        if not self._scanned:
            del buffer[: len(buffer) - len(buffer.lstrip())]
        if not buffer:
            return None
        if buffer[0] not in b"{[":
            line = buffer.find(b"\n", self._scanned) + 1
            self._scanned = len(buffer)
            return line or None
        position = self._scanned
        while mark := _MARKS.search(buffer, position):
            position = mark.end()
            if self._quoted and mark[0] == b"\\":
                position += 1
            elif self._passes_end(mark[0]):
                return position
        self._scanned = max(position, len(buffer))
        return None

    def _passes_end(self, mark: bytes) -> bool:
        if self._quoted:
            self._quoted = mark != b'"'
            # No JSON string has a line break in it.
            return mark == b"\n"
        if mark == b'"':
            self._quoted = True
        elif mark in b"{[":
            self._depth += 1
        elif mark in b"]}":
            self._depth -= 1
        return self._depth == 0
