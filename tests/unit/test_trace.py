# SPDX-License-Identifier: GPL-2.0-or-later
"""Recorded traces: what is written is read, torn ends are survived, hostile files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmp_upm.errors import TraceError
from qmp_upm.records import RECORD, Records, make_records
from qmp_upm.trace import BLOCK_MOST, TraceWriter, read_trace

HEADER = b'{"format": "qmp-upm-trace", "version": 1, "record_bytes": 34}\n'
PAGE = 4096


def some_records(count: int) -> Records:
    """Pages one after the other, to shared, a microsecond apart."""
    return make_records((1, i * PAGE, PAGE, 0, 1, 1000 * i, 1) for i in range(count))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A trace of three blocks: 3 records; none; 2 records after 7 lost ones."""
    path = tmp_path / "vm.trace"
    with TraceWriter(path, vm="a", policy="lazy", budget_bytes=1 << 20) as writer:
        writer.write(some_records(3), 10_000)
        writer.write(some_records(0), 20_000)
        writer.write(some_records(2), 30_000, dropped=7)
    return path


def test_what_is_written_is_read(path: Path) -> None:
    """Records, block ends and times, drops and the header."""
    trace = read_trace(path)
    assert (trace.records == np.concatenate([some_records(3), some_records(2)])).all()
    assert trace.reads == ((3, 10_000, 0), (3, 20_000, 0), (5, 30_000, 7))
    assert (trace.dropped, trace.torn_bytes) == (7, 0)
    assert (trace.header.vm, trace.header.policy) == ("a", "lazy")
    assert trace.header.budget_bytes == 1 << 20


def test_header_says_how_long_a_record_is(path: Path) -> None:
    """The form is that of the documentation."""
    assert json.loads(path.read_bytes().split(b"\n")[0])["record_bytes"] == RECORD.itemsize == 34


def test_a_long_batch_is_several_blocks(tmp_path: Path) -> None:
    """Its drops are counted once."""
    path = tmp_path / "long.trace"
    with TraceWriter(path) as writer:
        writer.write(some_records(BLOCK_MOST + 1), 5, dropped=3)
    trace = read_trace(path)
    assert trace.reads == ((BLOCK_MOST, 5, 3), (BLOCK_MOST + 1, 5, 0))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 2 * RECORD.itemsize + 27))
def test_a_torn_end_is_left_out_and_reported(path: Path, cut: int) -> None:
    """Wherever the writer was killed within the last block, the blocks before it are read."""
    whole = path.read_bytes()
    torn = path.with_name("torn.trace")
    torn.write_bytes(whole[:-cut])
    trace = read_trace(torn)
    assert (len(trace.records), trace.dropped) == (3, 0)
    assert trace.torn_bytes == 2 * RECORD.itemsize + 28 - cut


def test_an_end_of_zeroes_is_torn(path: Path) -> None:
    """A crash of the host may leave a file longer than what was written."""
    path.write_bytes(path.read_bytes()[:-20] + bytes(20))
    assert len(read_trace(path).records) == 3


@pytest.mark.parametrize("zeroes", [1, 28, 100_000])
@pytest.mark.parametrize("written", [0, 5])
def test_blocks_that_were_never_written_are_torn(path: Path, zeroes: int, written: int) -> None:
    """A power failure may leave zeroes where whole blocks should be, as a file system has it."""
    whole = path.read_bytes()
    before = len(read_trace(path).records)
    path.write_bytes(whole + b"\xff" * written + bytes(zeroes))
    trace = read_trace(path)
    assert (len(trace.records), trace.torn_bytes) == (before, written + zeroes)
    path.write_bytes(whole + bytes(zeroes + 28) + b"\xff")
    with pytest.raises(TraceError, match=f"damaged at byte {len(whole)}"):
        read_trace(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 3 * RECORD.itemsize + 27), flip=st.integers(1, 255))
def test_damage_is_an_error(path: Path, at: int, flip: int) -> None:
    """A byte that changed in the first block: an error, or blocks missing and reported; no lies."""
    data = bytearray(path.read_bytes())
    data[len(data) - 2 * 28 - 2 * RECORD.itemsize - 28 - 3 * RECORD.itemsize + at] ^= flip
    bad = path.with_name("bad.trace")
    bad.write_bytes(data)
    try:
        trace = read_trace(bad)
    except TraceError:
        return
    assert (len(trace.records), trace.torn_bytes > 0) == (0, True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"[]\n",
        b"{}\n",
        b"{}" + b" " * (1 << 17) + b"\n",
        b"[" * 60_000 + b"\n",
        b'{"format": "pcap", "version": 1}\n',
        b'{"format": "qmp-upm-trace", "version": 2}\n',
        bytes(range(256)) * 10,
        HEADER + b"x" * 100,
    ],
    ids=range(10),
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """Each with its name and a hint."""
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(TraceError, match="foreign") as caught:
        read_trace(path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset", -PAGE),
        ("offset", 1),
        ("offset", 1 << 43),
        ("size", 0),
        ("size", (1 << 43) - PAGE),
        ("private", 2),
        ("region", 0),
        ("region", 1 << 16),
        ("time_ns", -1),
    ],
)
def test_records_out_of_bounds_are_refused(tmp_path: Path, field: str, value: int) -> None:
    """With a checksum that is right, too."""
    path, records = tmp_path / "odd.trace", some_records(3)
    records[field][2] = value
    with TraceWriter(path) as writer:
        writer.write(records, 0)
    with pytest.raises(TraceError, match=f"record 2 .*{field}"):
        read_trace(path)


def test_too_long_a_trace_is_refused(path: Path) -> None:
    """Before it is in memory."""
    with pytest.raises(TraceError, match="more than 4 records"):
        read_trace(path, records_most=4)


def test_missing_and_unwritable_files_have_a_hint(tmp_path: Path) -> None:
    """What the operating system says, and what to do."""
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(TraceError, match="Is a directory"):
        TraceWriter(tmp_path)
