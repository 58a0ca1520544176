# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs on stderr: coloured on a terminal, JSON lines elsewhere, tracebacks included.

The libraries' messages, which go through `logging`, become lines of the same form. Under systemd
each line begins with its priority (sd-daemon(3)), and the journal has its own time stamps.

Writing a line neither raises nor waits, whatever has become of stderr: a thread writes what the
others queue. What there is no room for, and what the file refuses, is lost and counted.
"""

import atexit
import logging
import os
import select
import sys
import threading
from collections import deque
from types import TracebackType
from typing import Any

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

QUEUE_BYTES = 256 << 10
"""Bytes of lines that wait for a reader of stderr; more are lost."""
LINE_CHARACTERS = 16 << 10
"""The longest line; a longer text in it, such as a traceback, loses its beginning."""
FLUSH_SECONDS = 1.0
"""How long the end of the process waits for the last lines."""

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


class LineWriter:
    """Lines on a file descriptor, written by a thread of its own.

    ``lost``: lines that there was no room for, or that the file refused. Never goes back.
    """

    def __init__(self, file: int) -> None:
        self.lost = 0
        self._file = file
        self._lines: deque[bytes] = deque()
        self._room = QUEUE_BYTES
        self._told = 0
        self._torn = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> None:
        """Queue one line. Any thread; never raises, never waits for the file."""
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        with self._changed:
            if len(line) > self._room:
                self.lost += 1
                return
            self._room -= len(line)
            self._lines.append(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until all is written or lost; False if the file did not take it in that time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._room == QUEUE_BYTES, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines.popleft()
            written = self._put(self._news() + line)
            with self._changed:
                self.lost += not written
                self._room += len(line)
                self._changed.notify_all()

    def _news(self) -> bytes:
        """What was lost before the next line, in a line of its own."""
        lost, self._told = self.lost - self._told, self.lost
        start = b"\n" if self._torn else b""
        return start + (b'{"event": "log-lines-lost", "count": %d}\n' % lost if lost else b"")

    def _put(self, block: bytes) -> bool:
        left = memoryview(block)
        while left:
            try:
                left = left[os.write(self._file, left) :]
            except BlockingIOError:  # whoever shares the file may have made it so
                select.select((), (self._file,), ())
            except OSError:
                break
        self._torn = 0 < len(left) < len(block)
        return not left


class _Logger:
    """What structlog writes to: a method for each level, all the same."""

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer

    def msg(self, text: str) -> None:
        """Queue one line."""
        self._writer.write(text)

    log = debug = info = warn = warning = msg
    error = critical = exception = fatal = failure = msg


class _Handler(logging.Handler):
    """The same for `logging`."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one line."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - a message of a library that can't be formatted
            text = f"{record.name}: {record.msg!r}"
        self._writer.write(text)


writer = LineWriter(2)
"""This process's own, on stderr."""


def configure_logs(level: str) -> None:
    """Set up structlog and `logging` for this process.

    ``level``: debug, info, warning or error. Libraries are heard from warnings on.
    """
    terminal = sys.stderr.isatty()
    journal = not terminal and _is_journal(os.environ.get("JOURNAL_STREAM", ""))
    shared: list[Processor] = [structlog.processors.add_log_level]
    if not journal:
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=not terminal))
    rendering: list[Processor]
    if terminal:
        plain = structlog.dev.plain_traceback  # rich's own would show what variables hold
        rendering = [structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    else:
        rendering = [
            structlog.processors.format_exc_info,
            _shorten,
            structlog.processors.JSONRenderer(),
        ]
    if journal:
        rendering.append(_with_priority)
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=lambda *_: _Logger(writer),
    )
    _bridge(shared, rendering, level)
    sys.excepthook = _tell_death
    threading.excepthook = lambda died: (
        _tell_death(died.exc_type, died.exc_value, died.exc_traceback) if died.exc_value else None
    )
    atexit.register(writer.flush, FLUSH_SECONDS)


def _bridge(shared: list[Processor], rendering: list[Processor], level: str) -> None:
    handler = _Handler(writer)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    logging.captureWarnings(capture=True)


def _tell_death(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log = structlog.get_logger()
    log.critical("died", hint="report this", exc_info=(kind, error, trace))


def _is_journal(stream: str) -> bool:
    """Whether stderr is the stream that systemd made for the journal, as systemd.exec(5) has it."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def _shorten(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """A traceback of a deep recursion, or a text of a VM, is no reason for an endless line."""
    for key, value in line.items():
        if isinstance(value, str) and len(value) > LINE_CHARACTERS:
            line[key] = "…" + value[-LINE_CHARACTERS:]
    return line


def _with_priority(_logger: WrappedLogger, method: str, text: Any) -> str:
    return f"<{_PRIORITIES.get(method, 6)}>{text}"
