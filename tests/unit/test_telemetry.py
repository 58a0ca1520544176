# SPDX-License-Identifier: GPL-2.0-or-later
"""Telemetry: no line is lost unless counted, and no disk is filled or waited for."""

import asyncio
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_upm.rotation import CappedDirectory
from qmp_upm.telemetry import QUEUE_BYTES, TelemetryWriter, read_totals

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def writer(tmp_path: Path) -> TelemetryWriter:
    """One that is not started: the test writes."""
    return TelemetryWriter(CappedDirectory(tmp_path, MIB, 4 * MIB))


class FaultyDisk(CappedDirectory):
    """Does ``before`` at each write."""

    def __init__(self, directory: Path, before: Callable[[], None]) -> None:
        super().__init__(directory, MIB, 4 * MIB)
        self.before = before

    def append(self, name: str, block: bytes) -> None:
        """Perhaps."""
        self.before()
        super().append(name, block)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a file, which are whole."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


async def test_closing_loses_no_line(tmp_path: Path) -> None:
    """Lines that are being written, and lines that wait, are in the file when close() returns."""
    begun, go_on = threading.Event(), threading.Event()

    def before() -> None:
        begun.set()
        go_on.wait(20)

    writer = TelemetryWriter(FaultyDisk(tmp_path, before))
    telemetry = writer.of("vm")
    writer.start()
    telemetry.line("first")
    assert await asyncio.to_thread(begun.wait, 20)
    telemetry.line("second")
    go_on.set()
    assert await writer.close(20)
    assert [line["event"] for line in read_lines(telemetry.path)] == ["first", "second"]


async def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """Lines are refused and counted once the queue is full, and close() gives up in its time."""
    go_on = threading.Event()
    writer = TelemetryWriter(FaultyDisk(tmp_path, lambda: go_on.wait(20) and None))
    flooder, other = writer.of("flooder"), writer.of("other")
    writer.start()
    for number in range(2 * QUEUE_BYTES // KIB):
        flooder.line("batch", text="x" * KIB, number=number)
    other.line("batch")
    assert flooder.lost_lines > QUEUE_BYTES // KIB // 2
    assert other.lost_lines == 0
    assert sum(map(len, flooder._queue)) <= QUEUE_BYTES
    assert not await writer.close(0.01)
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "telemetry":
            thread.join(20)
    assert read_totals(flooder.path)["lost_lines"] == flooder.lost_lines


def test_a_full_disk_costs_lines_and_says_how_many(tmp_path: Path) -> None:
    """They are counted, said once in the log, and written down when the disk is well again."""
    full = [True]

    def before() -> None:
        if full[0]:
            raise OSError(28, "No space left on device")

    writer = TelemetryWriter(FaultyDisk(tmp_path, before))
    telemetry = writer.of("vm")
    seen = [telemetry.lost_lines]
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            telemetry.line("discard", discarded_bytes=4096, skipped_bytes=0)
            writer.write_queued()
            seen.append(telemetry.lost_lines)
        full[0] = False
        telemetry.line("discard", discarded_bytes=4096, skipped_bytes=0)
        writer.write_queued()
    assert seen == [0, 1, 2, 3]
    assert [(line["event"], bool(line["hint"])) for line in logs] == [("telemetry-failed", True)]
    totals = read_totals(telemetry.path)
    assert (totals["lost_lines"], totals["discarded_bytes"]) == (3, 4096)


async def test_a_defect_does_not_end_the_writing(tmp_path: Path) -> None:
    """It is logged with its traceback, its lines are counted, and those of others are written."""
    left = ["first"]

    def before() -> None:
        if left:
            raise KeyError(left.pop())

    writer = TelemetryWriter(FaultyDisk(tmp_path, before))
    first, second = writer.of("a"), writer.of("b")
    first.line("batch")
    second.line("batch")
    with structlog.testing.capture_logs() as logs:
        writer.start()
        assert await writer.close(20)
    assert [(line["event"], bool(line["exc_info"])) for line in logs] == [
        ("telemetry-failed", True)
    ]
    assert (first.lost_lines, len(read_lines(second.path))) == (1, 1)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: what a full disk does to a write.

    Only for as long as a write takes: the runner's own output may be such a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_is_cut_short_leaves_no_part(writer: TelemetryWriter) -> None:
    """A block that only half fits is lost whole; the file's lines before it are whole."""
    telemetry = writer.of("vm")
    telemetry.line("first", text="x" * 500)
    writer.write_queued()
    telemetry.line("second", text="x" * 1000)
    with structlog.testing.capture_logs(), file_limit(1000):
        writer.write_queued()
    assert [line["event"] for line in read_lines(telemetry.path)] == ["first"]
    assert telemetry.lost_lines == 1


def test_torn_line_spoils_no_other(tmp_path: Path, writer: TelemetryWriter) -> None:
    """A daemon that was killed left half a line: the next one's first line is whole."""
    (tmp_path / "vm.jsonl").write_text('{"event": "ba', encoding="utf-8")
    telemetry = writer.of("vm")
    for _ in range(2):
        telemetry.line("discard", discarded_bytes=4096, skipped_bytes=0)
        writer.write_queued()
    assert read_totals(telemetry.path)["discarded_bytes"] == 8192


def test_totals_go_over_all_parts(tmp_path: Path) -> None:
    """Rotation loses and counts nothing twice, and files stay below their size."""
    writer = TelemetryWriter(CappedDirectory(tmp_path, 8 * KIB, MIB))
    telemetry = writer.of("vm.1")
    for _ in range(100):
        telemetry.line("discard", discarded_bytes=4096, skipped_bytes=1, text="x" * 500)
        writer.write_queued()
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 5
    assert max(part.stat().st_size for part in parts) <= 8 * KIB
    totals = read_totals(telemetry.path)
    assert (totals["discards"], totals["skipped_bytes"]) == (100, 100)


def test_unreadable_lines_are_not_counted(tmp_path: Path) -> None:
    """Whatever a torn disk block looks like, the other lines add up."""
    good = b'{"event": "discard", "discarded_bytes": 1, "skipped_bytes": 0}\n'
    bad = [b"\xff\xfe\n", b"[]\n", b"\0\0\0\n", b'{"event": []}\n', b'{"event": "discard"}\n', b"{"]
    (tmp_path / "vm.jsonl").write_bytes(good + good.join(bad))
    assert read_totals(tmp_path / "vm.jsonl")["discarded_bytes"] == len(bad)
    with pytest.raises(FileNotFoundError):
        read_totals(tmp_path / "other.jsonl")


writes = st.lists(
    st.tuples(st.sampled_from(["a", "b", "a.jsonl"]), st.integers(1, 700)), max_size=120
)


@settings(max_examples=50, deadline=None)
@given(writes)
def test_the_cap_holds(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    """Whoever writes what: the directory never passes its size, and what is left is the newest."""
    directory = tmp_path_factory.mktemp("cap")
    stranger = directory / "notes.txt"
    stranger.write_bytes(b"x" * 10_000)
    files = CappedDirectory(directory, 1000, 4000)
    written: dict[str, bytes] = {}
    for name, size in steps:
        files.append(name, b"x" * size + b"\n")
        written[name] = written.get(name, b"") + b"x" * size + b"\n"
        held = {part.path: part.size for part in files.parts()}
        assert sum(held.values()) <= 4000
        assert max(held.values()) <= 1000
    for name, everything in written.items():
        parts = [part.path.read_bytes() for part in files.parts() if part.name == name]
        assert everything.endswith(b"".join(parts))
    assert stranger.exists()


def test_a_flooding_vm_evicts_its_own(tmp_path: Path) -> None:
    """The quiet VM's oldest line survives any amount of another's."""
    files = CappedDirectory(tmp_path, 1000, 4000)
    files.append("quiet", b"only\n")
    for _ in range(200):
        files.append("loud", b"x" * 500 + b"\n")
    assert files.path("quiet").read_bytes() == b"only\n"
    assert files.evicted_bytes > 90_000


def test_names_without_end_make_no_files_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many names there are, so many files are kept, those written to last."""
    monkeypatch.setattr("qmp_upm.rotation.FILES_MOST", 3)
    files = CappedDirectory(tmp_path, 1000, 100_000)
    for number in range(9):
        files.append(f"vm{number}", b"line\n")
        os.utime(files.path(f"vm{number}"), (number, number))
    files.append("vm6", b"line\n")
    files.append("vm9", b"line\n")
    assert [part.name for part in files.parts()] == ["vm6", "vm8", "vm9"]
    assert files.evicted_bytes == 7 * 5


def test_what_is_already_there_counts(tmp_path: Path) -> None:
    """A restarted daemon keeps the cap over what an earlier one left."""
    for number in range(1, 5):
        (tmp_path / f"old.jsonl.{number}").write_bytes(b"x" * 999 + b"\n")
        os.utime(tmp_path / f"old.jsonl.{number}")
    files = CappedDirectory(tmp_path, 1000, 4000)
    files.append("new", b"line\n")
    assert [part.number for part in files.parts() if part.name == "old"] == [2, 3, 4]


def test_an_idle_writer_sleeps(writer: TelemetryWriter) -> None:
    """With nothing queued nothing wakes it, however many VMs there are."""
    made = [writer.of(f"vm{number}") for number in range(256)]
    assert not writer._work.is_set()
    made[7].line("batch")
    made[7].line("batch")
    assert writer._work.is_set()
    assert [telemetry.vm for telemetry in writer._dirty] == ["vm7"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Whoever may write in the directory leads no line of ours to another file."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept\n")
    (tmp_path / "vm.jsonl").symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic"):
        CappedDirectory(tmp_path, MIB, 4 * MIB).append("vm", b"lost\n")
    assert elsewhere.read_text() == "kept\n"
