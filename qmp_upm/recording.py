# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's conversions on their way from the daemon to a trace: the control socket's event RECORDS.

They travel in chunks of a bounded size. Each says how many records came before it since the
recording began, so that whatever is lost on the way, and wherever, shows as a gap of known length.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmp_upm.errors import MessageError
from qmp_upm.events import Bounds
from qmp_upm.records import RECORD
from qmp_upm.trace import Block

EVENT = "RECORDS"
CHUNK_RECORDS = 4096
"""In a chunk: 136 KiB, a third more as base64."""


BOUNDS: Bounds[Block] = Bounds(
    weigh=lambda block: len(block.records) + 1,
    count=lambda block: len(block.records) + block.dropped,
    most=1 << 18,
)
"""What waits for a client that follows a VM's conversions: 9 MiB of records."""


class Chunk(BaseModel):
    """The event's data. ``records``: base64 of an array of ``qmp_upm.records.RECORD``."""

    model_config = ConfigDict(frozen=True)

    vm: str
    at: Annotated[int, Field(ge=0)]
    """Records before these, those that were lost included."""
    now_ns: int
    """When the daemon read them, CLOCK_MONOTONIC."""
    records: str
    last: bool
    """Whether the recording ends here: it was stopped, or the VM is gone."""


class Sender:
    """Turns the blocks of one recording into chunks."""

    def __init__(self, vm: str) -> None:
        self._vm = vm
        self._at = 0
        self._now_ns = 0

    def chunks(self, block: Block, lost: int) -> Iterator[Mapping[str, object]]:
        """Of the next block; ``lost`` records before it had no room."""
        self._at += lost + block.dropped
        self._now_ns = block.now_ns
        for start in range(0, max(len(block.records), 1), CHUNK_RECORDS):
            part = block.records[start : start + CHUNK_RECORDS]
            yield self._chunk(part.tobytes(), last=False)
            self._at += len(part)

    def last(self, lost: int) -> Mapping[str, object]:
        """That there are no more."""
        self._at += lost
        return self._chunk(b"", last=True)

    def _chunk(self, records: bytes, *, last: bool) -> Mapping[str, object]:
        return Chunk(
            vm=self._vm,
            at=self._at,
            now_ns=self._now_ns,
            records=base64.b64encode(records).decode(),
            last=last,
        ).model_dump()


class Receiver:
    """Turns the chunks of one recording back into blocks, and finds what is missing."""

    def __init__(self) -> None:
        self.received = 0
        self.lost = 0
        self.ended = False

    def block(self, data: object) -> Block:
        """Of the event's data. MessageError if it is none, or goes back."""
        try:
            chunk = Chunk.model_validate(data)
            raw = base64.b64decode(chunk.records, validate=True)
            records = np.frombuffer(raw, dtype=RECORD)
        except (ValidationError, binascii.Error, ValueError) as error:
            raise _broken(f"it can't be read: {error}") from error
        gap = chunk.at - self.received - self.lost
        if gap < 0:
            raise _broken("records come twice")
        self.lost += gap
        self.received += len(records)
        self.ended = chunk.last
        return Block(records, gap, chunk.now_ns)


def _broken(what: str) -> MessageError:
    return MessageError(
        f"an event {EVENT} of the daemon is malformed: {what}",
        hint="are this command and the daemon of the same release?",
    )
