# SPDX-License-Identifier: GPL-2.0-or-later
"""What happened to each VM, as JSON lines in a file of its own.

Lines are queued and written by a task in blocks, so that a slow disk costs nothing but lines; those
there is no room for are counted in the next line written.
"""

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import aiofiles
import structlog
from aiofiles.threadpool.binary import AsyncBufferedIOBase

LINES_MOST = 20_000
FLUSH_SECONDS = 0.2

log = structlog.get_logger()


class Telemetry:
    """The file ``<directory>/<vm>.jsonl``; lines are appended.

    Every line has ``event``, ``vm``, ``time`` (seconds since 1970) and ``mono_ns``
    (CLOCK_MONOTONIC).
    """

    def __init__(self, directory: Path, vm: str) -> None:
        self.path = directory / f"{vm}.jsonl"
        self._vm = vm
        self._lines: deque[str] = deque()
        self._lost = 0
        self._failed = False
        self._stop = asyncio.Event()

    def line(self, event: str, **fields: object) -> None:
        """Queue one line. Never waits."""
        if len(self._lines) >= LINES_MOST:
            self._lost += 1
            return
        head: dict[str, object] = {
            "event": event,
            "vm": self._vm,
            "time": time.time(),
            "mono_ns": time.monotonic_ns(),
        }
        if self._lost:
            head["lost_lines"], self._lost = self._lost, 0
        self._lines.append(json.dumps(head | fields))

    async def run(self) -> None:
        """Write until stopped, then what is left. Never cancel it: a block would be lost."""
        while not self._stop.is_set():
            try:
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._stop.wait()
            except TimeoutError:
                pass
            await self.flush()
        await self.flush()  # what was queued while the last block was being written

    @property
    def waiting(self) -> int:
        """Lines that no write has begun with."""
        return len(self._lines)

    def stop(self) -> None:
        """Let run() write what is left, and end."""
        self._stop.set()

    async def flush(self) -> None:
        """Write what is queued. A failure is logged once; its lines count as lost."""
        if not self._lines:
            return
        block, self._lines = self._lines, deque()
        try:
            async with aiofiles.open(self.path, "ab+") as file:
                await file.write(await _line_end(file) + "\n".join(block).encode() + b"\n")
            self._failed = False
        except OSError as error:
            self._lost += len(block)
            if not self._failed:
                log.error(  # noqa: TRY400 - an operator needs no traceback
                    "telemetry-failed",
                    vm=self._vm,
                    file=str(self.path),
                    error=str(error),
                    hint="check the directory and the disk; the VM is served all the same",
                )
            self._failed = True


async def _line_end(file: AsyncBufferedIOBase) -> bytes:
    """What ends a line that a killed daemon left torn, so that it spoils no other."""
    if await file.seek(0, os.SEEK_END) == 0:
        return b""
    await file.seek(-1, os.SEEK_END)
    return b"" if await file.read(1) == b"\n" else b"\n"


def read_totals(path: Path) -> Mapping[str, int]:
    """Adds a file up: conversions, bytes and drops of its batches, and discarded bytes.

    A torn last line, as a killed daemon leaves, is not counted.
    """
    totals = dict.fromkeys(
        (
            "conversions",
            "to_private_bytes",
            "to_shared_bytes",
            "deferred_bytes",
            "dropped",
            "discarded_bytes",
            "skipped_bytes",
            "discards",
            "decisions",
        ),
        0,
    )
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        keys: tuple[str, ...] = ()
        if line["event"] == "batch":
            keys = (
                "conversions",
                "to_private_bytes",
                "to_shared_bytes",
                "deferred_bytes",
                "dropped",
            )
        elif line["event"] == "discard":
            keys = ("discarded_bytes", "skipped_bytes")
            totals["discards"] += 1
        elif line["event"] == "decision":
            totals["decisions"] += 1
        for key in keys:
            totals[key] += line[key]
    return totals
