# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs: lines of a form, tracebacks in them, and no way for a reader of them to harm the daemon.

Real: pipes, files and processes. Simulated: the journal's stream is a file of the test's.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_upm.logs import QUEUE_BYTES, LineWriter

SCRIPT = """
import asyncio, logging, os, sys
import structlog
from qmp_upm.logs import configure_logs
{before}
configure_logs("info")
log = structlog.get_logger(vm="db")
{body}
"""


def run(body: str, before: str = "", **streams: object) -> "subprocess.CompletedProcess[str]":
    """A process that logs."""
    script = SCRIPT.format(body=body, before=before)
    return subprocess.run(  # noqa: PLW1510 - the test looks at the code
        [sys.executable, "-c", script],
        text=True,
        timeout=60,
        **({"capture_output": True} | streams),
    )


def lines(text: str) -> list[dict[str, object]]:
    """Each one is JSON."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends, for reading and for writing."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def test_a_traceback_is_in_its_line() -> None:
    """What says 'report this' has what to report, and says of which VM it is."""
    body = "try:\n    1 / 0\nexcept Exception:\n    log.exception('task-died', hint='report this')"
    [line] = lines(run(body).stderr)
    assert (line["event"], line["vm"], line["level"]) == ("task-died", "db", "error")
    assert str(line["exception"]).startswith("Traceback")
    assert "ZeroDivisionError" in str(line["exception"])


def test_libraries_and_dying_speak_json() -> None:
    """Lost exceptions of asyncio, warnings, threads and the end of the process."""
    body = """
async def lose():
    async def fail(): raise KeyError("lost")
    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
asyncio.run(lose())
import threading, warnings
warnings.warn("old")
thread = threading.Thread(target=lambda: [][1]); thread.start(); thread.join()
raise OSError("the end")
"""
    result = run(body)
    found = lines(result.stderr)
    assert result.returncode == 1
    assert [line["level"] for line in found] == ["error", "warning", "critical", "critical"]
    assert "KeyError" in str(found[0]["exception"])
    assert found[0]["logger"] == "asyncio"
    assert "IndexError" in str(found[2]["exception"])
    assert "the end" in str(found[3]["exception"])


def test_the_journal_is_told_priorities(tmp_path: Path) -> None:
    """And no time: it has its own. A file that is not the journal's gets none."""
    file = tmp_path / "journal"
    body = "log.info('a'); log.warning('b'); log.error('c'); logging.error('d')"
    before = "found = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{found.st_dev}:{found.st_ino}'"
    with file.open("w") as stream:
        run(body, before, capture_output=False, stderr=stream)
    said = file.read_text().splitlines()
    assert [line[:3] for line in said] == ["<6>", "<4>", "<3>", "<3>"]
    assert all("timestamp" not in json.loads(line[3:]) for line in said)
    assert (
        "timestamp" in lines(run("log.info('a')", "os.environ['JOURNAL_STREAM'] = '1:1'").stderr)[0]
    )


@pytest.mark.parametrize("stream", ["closed pipe", "/dev/full", "closed file"])
def test_a_stderr_that_is_gone_is_nobodys_end(
    stream: str, pipe: tuple[int, int], tmp_path: Path
) -> None:
    """Closed, on a full disk, or never there: the process goes on, and counts what it lost."""
    body = f"""
from qmp_upm.logs import writer
for _ in range(100): log.warning("x")
writer.flush(20)
open({str(tmp_path / "lost")!r}, "w").write(str(writer.lost))
"""
    os.close(pipe[0])
    with Path("/dev/full").open("w") as full:
        streams = {"closed pipe": pipe[1], "/dev/full": full, "closed file": full}
        before = "os.close(2)" if stream == "closed file" else ""
        result = run(body, before, capture_output=False, stderr=streams[stream])
    assert result.returncode == 0
    assert (tmp_path / "lost").read_text() == "100"


def test_a_blocked_reader_holds_nobody_up(pipe: tuple[int, int]) -> None:
    """Lines beyond the queue are counted; once somebody reads, what was lost is said."""
    writer = LineWriter(pipe[1])
    line, sent = "x" * 1000, 4 * QUEUE_BYTES // 1000
    for _ in range(sent):
        writer.write(line)  # would never return if it waited
    assert not writer.flush(0)
    lost = writer.lost
    assert 0 < lost < sent
    got: list[bytes] = []

    def read() -> None:
        while text := os.read(pipe[0], 1 << 16):
            got.append(text)

    reader = threading.Thread(target=read)
    reader.start()
    assert writer.flush(20)
    os.close(pipe[1])
    reader.join(20)
    text = b"".join(got)
    # In one line or in several: the pipe takes some before it is full.
    told = re.findall(rb'{"event": "log-lines-lost", "count": (\d+)}\n', text)
    assert sum(map(int, told)) == lost
    assert text.count(line.encode()) == sent - lost
    assert writer.lost == lost


def test_a_file_that_others_made_non_blocking_is_waited_for(pipe: tuple[int, int]) -> None:
    """By the writing thread alone; nothing is lost, and no line is torn."""
    os.set_blocking(pipe[1], False)
    writer = LineWriter(pipe[1])
    for number in range(200):
        writer.write(f"{number} " + "x" * 1000)
    got = b""
    while got.count(b"\n") < 200:
        got += os.read(pipe[0], 1 << 16)
    assert [int(line.split()[0]) for line in got.splitlines()] == list(range(200))
    assert writer.lost == 0


def test_a_line_has_an_end() -> None:
    """A text without measure in it loses its beginning."""
    [line] = lines(run("log.warning('x', text='a' * 100_000 + 'z')").stderr)
    assert len(str(line["text"])) < 20_000
    assert str(line["text"]).endswith("az")
