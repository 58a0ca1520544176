# SPDX-License-Identifier: GPL-2.0-or-later
"""What happened to each VM, as JSON lines in files of its own.

Lines are queued by the event loop and written in a thread, in blocks: one way there and back
through `aiofiles` for whatever all VMs have, since each costs some 100 µs however little it writes.
A disk that is slow, full or gone costs lines, which are counted, and nothing else: no VM waits for
it, memory is bounded per VM, and the daemon's end does not depend on it. Nobody wakes up while
nothing happens.
"""

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

import aiofiles.os
import structlog

from qmp_upm.identity import file_stem
from qmp_upm.rotation import CappedDirectory, older_parts
from qmp_upm.supervision import Supervisor
from qmp_upm.threads import DaemonThreads

QUEUE_BYTES = 256 << 10
"""Bytes of a VM's lines that wait for the disk; more are lost."""
FLUSH_SECONDS = 0.2
"""How long lines are collected before they are written."""

log = structlog.get_logger()


class Telemetry:
    """The lines of one VM. ``line`` is called in the event loop, ``write`` in a thread.

    Every line has ``event``, ``vm``, ``time`` (seconds since 1970) and ``mono_ns``
    (CLOCK_MONOTONIC). Each counter is changed by one of the two threads only.
    """

    def __init__(self, writer: "TelemetryWriter", vm: str) -> None:
        self.vm = vm
        self._file = file_stem(vm)
        self.path = writer.files.path(self._file)
        self.dirty = False
        self._writer = writer
        self._queue: deque[bytes] = deque()
        self._queued_bytes = self._done_bytes = 0
        self._refused = self._failed = self._told = 0

    @property
    def lost_lines(self) -> int:
        """Lines that there was no room for, or that the disk refused. Never goes back."""
        return self._refused + self._failed

    def line(self, event: str, **fields: object) -> None:
        """Queue one line. Never waits."""
        text = self._encode(event, fields)
        if self._queued_bytes - self._done_bytes + len(text) > QUEUE_BYTES:
            self._refused += 1
            return
        self._queued_bytes += len(text)
        self._queue.append(text)
        if not self.dirty:
            self.dirty = True
            self._writer.mark(self)

    def _encode(self, event: str, fields: dict[str, object]) -> bytes:
        head: dict[str, object] = {
            "event": event,
            "vm": self.vm,
            "time": time.time(),
            "mono_ns": time.monotonic_ns(),
        }
        return json.dumps(head | fields).encode() + b"\n"

    def write(self, files: CappedDirectory) -> None:
        """Write what is queued, after what was lost before it. OSError: it is lost."""
        self.dirty = False  # first: a line that comes now marks it again
        taken = [self._queue.popleft() for _ in range(len(self._queue))]
        lost = self.lost_lines
        block = b"".join(taken)
        news: dict[str, object] = {"lost_lines": lost - self._told}
        said = self._encode("lines-lost", news) if lost > self._told else b""
        try:
            files.append(self._file, said + block)
            self._told = lost
        except BaseException:
            self._failed += len(taken)
            raise
        finally:
            self._done_bytes += len(block)


class TelemetryWriter:
    """The task that writes, one pass at a time. ``files`` says where, and how much at most."""

    def __init__(self, files: CappedDirectory, supervisor: Supervisor | None = None) -> None:
        self.files = files
        self._supervisor = supervisor or Supervisor()
        self._dirty: deque[Telemetry] = deque()
        self._work = asyncio.Event()
        self._stop = asyncio.Event()
        self._failing = False
        self._task: asyncio.Task[None]

    def of(self, vm: str) -> Telemetry:
        """What a VM's session writes to."""
        return Telemetry(self, vm)

    def mark(self, telemetry: Telemetry) -> None:
        """Have the lines of this VM written soon."""
        self._dirty.append(telemetry)
        self._work.set()

    def start(self) -> None:
        """Begin to write."""
        keeping = self._supervisor.keep("telemetry", self._run)
        self._task = asyncio.get_running_loop().create_task(keeping)

    async def close(self, seconds: float) -> bool:
        """Write what is left, and end; False if the disk did not take it in that time."""
        self._stop.set()
        self._work.set()
        done, _ = await asyncio.wait([self._task], timeout=seconds)
        if not done:
            self._task.cancel()
            log.warning(
                "telemetry-not-written",
                directory=str(self.files.directory),
                hint="the disk hangs; what was queued is lost",
            )
        return bool(done)

    async def _run(self) -> None:
        write, disk = aiofiles.os.wrap(self.write_queued), DaemonThreads("telemetry")
        self._work.set()  # what a pass that died has left
        while not self._stop.is_set():
            await self._work.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    await self._stop.wait()
            self._work.clear()
            await write(executor=disk)
        await write(executor=disk)

    def write_queued(self) -> None:
        """Write what is queued. A failure is logged once, until the disk is well again."""
        for _ in range(len(self._dirty)):
            telemetry = self._dirty.popleft()
            try:
                telemetry.write(self.files)
                self._failing = False
            except Exception as error:  # what ends a pass would take all VMs' telemetry with it
                if not self._failing:
                    log.error(  # noqa: TRY400 - of a disk's trouble an operator needs no traceback
                        "telemetry-failed",
                        vm=telemetry.vm,
                        file=str(telemetry.path),
                        error=str(error),
                        hint="check the directory and the disk; the VMs are served all the same",
                        exc_info=None if isinstance(error, OSError) else error,
                    )
                self._failing = True


_SUMMED: dict[str, tuple[str, ...]] = {
    "batch": ("conversions", "to_private_bytes", "to_shared_bytes", "deferred_bytes", "dropped"),
    "discard": ("discarded_bytes", "skipped_bytes"),
    "lines-lost": ("lost_lines",),
}
_COUNTED = {"discard": "discards", "decision": "decisions"}


def read_totals(path: Path) -> Mapping[str, int]:
    """Adds a VM's telemetry up, over its older parts and the present file.

    Conversions, bytes and drops of its batches, discarded and skipped bytes, and how many lines
    were lost. What is torn, as a killed daemon or a full disk leaves it, is not counted; nor is
    what was deleted to keep the cap. FileNotFoundError if there is neither.
    """
    totals = dict.fromkeys([key for keys in _SUMMED.values() for key in keys], 0)
    totals |= dict.fromkeys(_COUNTED.values(), 0)
    with ExitStack() as stack:
        for file in _open_parts(path, stack):
            for line in _objects(file):
                event = str(line.get("event"))
                if event in _COUNTED:
                    totals[_COUNTED[event]] += 1
                for key in _SUMMED.get(event, ()):
                    value = line.get(key)
                    totals[key] += value if isinstance(value, int) else 0
    return totals


def _open_parts(path: Path, stack: ExitStack) -> list[TextIO]:
    """The parts, while the daemon may be rotating them: each one once."""
    files: dict[int, TextIO] = {}
    for part in _paths(path):
        with suppress(FileNotFoundError):
            file = stack.enter_context(part.open(encoding="utf-8", errors="replace"))
            files[os.fstat(file.fileno()).st_ino] = file
    if not files:
        raise FileNotFoundError(path)
    return list(files.values())


def _paths(path: Path) -> Iterator[Path]:
    yield path  # opened before the others are looked for: as an older part it has the same inode
    for _, older in older_parts(path):
        yield older


def _objects(file: TextIO) -> Iterator[dict[str, object]]:
    for text in file:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line
