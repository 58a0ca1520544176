# SPDX-License-Identifier: GPL-2.0-or-later
"""Recorded conversions in a file: what ``record`` writes, and the simulator reads back.

The form, version 1. All numbers are little-endian.

::

    header   one line of JSON, ended by a line feed, 64 KiB at most:
             {"format": "qmp-upm-trace", "version": 1, "record_bytes": 34, "vm": "...", ...}
    block    "UPMB"          4 bytes
             count           4 bytes, records in the block, at most 2^20
             dropped         8 bytes, records that were lost before these
             now_ns          8 bytes, signed: when the daemon read them, CLOCK_MONOTONIC
             crc             4 bytes, CRC-32 of the 24 bytes before it and of the records
             records         count times RECORD (qmp_upm.records), packed
    block    ...

A block is a batch as the policy was given it; one without records is a decision after nothing but
time. A file ends wherever its writer was killed: a last block that is not whole is left out, and
reported. A block that is wrong anywhere else is an error: the file was damaged. Records may be out
of order in time by what several processors of a guest race for.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, BinaryIO, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmp_upm.errors import TraceError
from qmp_upm.records import RECORD, RECORD_LIMITS, SIZE, Records

HEADER_MOST = 64 << 10
BLOCK_MOST = 1 << 20
"""Records in a block: what a reader has in memory at a time is 34 MiB at most."""
RECORDS_MOST = 1 << 26
"""Records that ``read_trace`` takes into memory: 2.1 GiB."""

_MAGIC = b"UPMB"
_BLOCK = struct.Struct("<4sIQqI")
_CRC_BYTES = 4


class Header(BaseModel):
    """The first line. Keys that a newer writer adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal["qmp-upm-trace"]
    version: Literal[1]
    record_bytes: Literal[34]
    vm: Annotated[str, Field(max_length=256)] = ""
    """The VM's name."""
    policy: Annotated[str, Field(max_length=256)] = ""
    """The policy that it was recorded under."""
    parameters: dict[str, object] = Field(default_factory=dict)
    """The policy's parameters."""
    budget_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    """The budget at that time."""


@dataclass(frozen=True)
class Block:
    """One batch. ``now_ns``: when it was read; ``dropped``: records lost before it."""

    records: Records
    dropped: int
    now_ns: int


class Read(NamedTuple):
    """When a batch was read, up to which of the trace's records, and how many were lost before."""

    end: int
    now_ns: int
    dropped: int


@dataclass(frozen=True)
class Trace:
    """A whole trace. ``torn_bytes``: of a last block that was not whole."""

    header: Header
    records: Records
    reads: tuple[Read, ...]
    torn_bytes: int = 0

    @property
    def dropped(self) -> int:
        """Records lost when it was recorded."""
        return sum(read.dropped for read in self.reads)


class TraceWriter:
    """Writes a new trace; raises TraceError if the file can't be written.

    Each ``write`` is handed to the operating system before it returns.
    """

    def __init__(
        self,
        path: Path,
        *,
        vm: str = "",
        policy: str = "",
        parameters: Mapping[str, object] | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        self._path = path
        header = Header(
            format="qmp-upm-trace",
            version=1,
            record_bytes=34,
            vm=vm,
            policy=policy,
            parameters=dict(parameters or {}),
            budget_bytes=budget_bytes,
        )
        try:
            self._file: BinaryIO = path.open("wb", buffering=0)
        except OSError as error:
            raise self._failed(error) from error
        self._put(header.model_dump_json().encode() + b"\n")

    def write(self, records: Records, now_ns: int, dropped: int = 0) -> None:
        """Append a batch; see Block for the arguments."""
        for start in range(0, max(len(records), 1), BLOCK_MOST):
            part = np.ascontiguousarray(records[start : start + BLOCK_MOST], dtype=RECORD)
            self._put(_packed(Block(part, dropped, now_ns)))
            dropped = 0

    def close(self) -> None:
        """No more is written."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> TraceError:
        return TraceError(
            f"cannot write {self._path}: {error.strerror}",
            hint="give another file, or make room for it",
        )


def _packed(block: Block) -> bytes:
    payload = block.records.tobytes()
    head = _BLOCK.pack(_MAGIC, len(block.records), block.dropped, block.now_ns, 0)[:-_CRC_BYTES]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


REST_BYTES = 1 << 16
"""Read at a time behind what is no block."""


class TraceReader:
    """Iterates over the blocks of an open trace, one in memory at a time.

    After the last one ``torn_bytes`` says what was left out at the end. TraceError says where a
    file is damaged, or why it is none of ours.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._at = 0
        self.torn_bytes = 0
        self.header = self._read_header()

    def __iter__(self) -> Iterator[Block]:
        while (block := self._next()) is not None:
            yield block

    def _read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise TraceError(
                f"cannot read {self._name}: {error.strerror}", hint="check the file"
            ) from error
        self._at += len(data)
        return data

    def _read_header(self) -> Header:
        line = self._file.readline(HEADER_MOST)
        self._at = len(line)
        hint = "traces are written by 'qmp-upm record'; is it the right file?"
        if not line.endswith(b"\n"):
            raise TraceError(f"{self._name} is no trace: it has no header line", hint=hint)
        try:
            return Header.model_validate(json.loads(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "header"
            raise TraceError(
                f"{self._name} is no trace that this release reads: {where}: {first['msg']}",
                hint=hint,
            ) from error
        except (ValueError, RecursionError) as error:
            raise TraceError(
                f"{self._name} is no trace: its first line is not JSON", hint=hint
            ) from error

    def _next(self) -> Block | None:
        start = self._at
        head = self._read(_BLOCK.size)
        if len(head) < _BLOCK.size:
            self.torn_bytes = len(head)
            return None
        magic, count, dropped, now_ns, crc = _BLOCK.unpack(head)
        if magic != _MAGIC or count > BLOCK_MOST:
            self._torn_or_damaged(start, "no block begins there")
            return None
        payload = self._read(count * RECORD.itemsize)
        if len(payload) < count * RECORD.itemsize:
            self.torn_bytes = self._at - start
            return None
        if zlib.crc32(payload, zlib.crc32(head[:-_CRC_BYTES])) != crc:
            self._torn_or_damaged(start, "the checksum is wrong")
            return None
        records = np.frombuffer(payload, dtype=RECORD)
        self._check(records, start)
        return Block(records, dropped, now_ns)

    def _torn_or_damaged(self, start: int, what: str) -> None:
        """A block that reaches the end may be one whose bytes were never all written.

        So may be one behind which is nothing but zeroes: what a file system shows of blocks that it
        had given the file, and had not written when the power failed.
        """
        while rest := self._read(REST_BYTES):
            if any(rest):
                raise TraceError(
                    f"{self._name} is damaged at byte {start}: {what}",
                    hint="copy it again from where it was recorded",
                )
        self.torn_bytes = self._at - start

    def _check(self, records: Records, start: int) -> None:
        for name, limit in RECORD_LIMITS.items():
            column = records[name].astype(np.int64)
            wrong = (column < limit.least) | (column > limit.most) | (column % limit.unit != 0)
            if wrong.any():
                self._refuse(start, int(wrong.argmax()), name)
        beyond = records["offset"] + records["size"] > SIZE.most
        if beyond.any():
            self._refuse(start, int(beyond.argmax()), "size")

    def _refuse(self, start: int, row: int, name: str) -> None:
        raise TraceError(
            f"{self._name}: record {row} of the block at byte {start}: {name} is out of bounds",
            hint="it was not written by 'qmp-upm record', or by a faulty one",
        )


def read_trace(path: Path, records_most: int = RECORDS_MOST) -> Trace:
    """A whole trace in memory; TraceError if it is damaged, or longer than ``records_most``."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise TraceError(
            f"cannot read {path}: {error.strerror}", hint="give a file of 'qmp-upm record'"
        ) from error
    with file:
        reader = TraceReader(file, str(path))
        parts: list[Records] = []
        reads: list[Read] = []
        total = 0
        for block in reader:
            total += len(block.records)
            if total > records_most:
                raise TraceError(
                    f"{path} has more than {records_most} records",
                    hint="record for a shorter time; the simulator has a trace in memory",
                )
            parts.append(block.records)
            reads.append(Read(total, block.now_ns, block.dropped))
    records = np.concatenate(parts) if parts else np.empty(0, dtype=RECORD)
    return Trace(reader.header, records, tuple(reads), reader.torn_bytes)
