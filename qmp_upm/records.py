# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversions in bulk: one numpy row each, from the wire to the policies.

What QEMU sends becomes an array here or is refused, as strictly as any other message: each row is a
list of seven integers, and each integer is within the limits of its field.
"""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qmp_upm.pages import PAGE_BYTES

RECORD = np.dtype(
    [
        ("region", "<u4"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("private", "u1"),
        ("deferred", "u1"),
        ("time_ns", "<i8"),
        ("count", "<u4"),
    ]
)
"""A conversion, or a run of neighbours merged. The fields are those of Record."""

Records = NDArray[np.void]
"""A one-dimensional array of RECORD."""


class Record(NamedTuple):
    """One row, for code that wants one.

    ``offset`` and ``size`` in bytes, ``time_ns`` of CLOCK_MONOTONIC. ``private``: 1 if the range
    became private. ``deferred``: 1 if the copy that it left was kept. ``count``: the guest's
    conversions in it; 0 where the plugin only took a copy into its ledger.
    """

    region: int
    offset: int
    size: int
    private: int
    deferred: int
    time_ns: int
    count: int  # type: ignore[assignment] # a field, where tuple has a method


class Limits(NamedTuple):
    """What an integer of the wire may be: ``least`` to ``most``, and a multiple of ``unit``."""

    least: int
    most: int
    unit: int = 1


# Below 8 TiB, so that the last page of any range has a number of 32 bits.
OFFSET = Limits(0, (1 << 43) - PAGE_BYTES, PAGE_BYTES)
SIZE = Limits(PAGE_BYTES, (1 << 43) - PAGE_BYTES, PAGE_BYTES)
REGION = Limits(1, (1 << 16) - 1)
FLAG = Limits(0, 1)
RECORD_LIMITS = {
    "region": REGION,
    "offset": OFFSET,
    "size": SIZE,
    "private": FLAG,
    "deferred": FLAG,
    "time_ns": Limits(0, (1 << 63) - 1),
    "count": Limits(0, (1 << 32) - 1),
}


def make_records(rows: Iterable[tuple[int, ...]] = ()) -> Records:
    """An array of these rows, whose limits are the caller's to keep."""
    return np.array([tuple(row) for row in rows], dtype=RECORD)


NO_RECORDS = make_records()


def read_records(value: object, most: int) -> Records:
    """Rows of x-upm-read as RECORD. Raises ValueError that names the first wrong row and field."""
    if value == []:
        return NO_RECORDS  # what an idle VM answers, again and again
    table = read_table(value, RECORD_LIMITS, most)
    records = np.empty(len(table), dtype=RECORD)
    for at, name in enumerate(RECORD_LIMITS):
        records[name] = table[:, at]
    return records


def read_table(value: object, limits: dict[str, Limits], most: int) -> NDArray[np.int64]:
    """``value``, a list of at most ``most`` lists of integers, one of each of ``limits``, as int64.

    Raises ValueError that names the first wrong row and field. Python's JSON makes bool, float and
    str types of their own, so a look at the types tells what an array could no longer.
    """
    if type(value) is not list or len(value) > most:
        raise ValueError(f"not a list of at most {most} rows")
    width = len(limits)
    if set(map(type, value)) - {list} or set(map(len, value)) - {width}:
        bad = next(i for i, row in enumerate(value) if type(row) is not list or len(row) != width)
        raise ValueError(f"row {bad} is not a list of {width} integers")
    flat = list(chain.from_iterable(value))
    names = list(limits)
    if set(map(type, flat)) - {int}:
        bad = next(i for i, item in enumerate(flat) if type(item) is not int)
        raise ValueError(f"row {bad // width}: {names[bad % width]} is not an integer")
    try:
        table = np.array(flat, dtype=np.int64).reshape(-1, width)
    except OverflowError:
        bad = next(i for i, item in enumerate(flat) if not -(1 << 63) <= item < 1 << 63)
        raise ValueError(f"row {bad // width}: {names[bad % width]} is out of bounds") from None
    least = np.array([limit.least for limit in limits.values()])
    most_of = np.array([limit.most for limit in limits.values()])
    unit = np.array([limit.unit for limit in limits.values()])
    wrong = (table < least) | (table > most_of) | (table % unit != 0)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        limit = limits[names[column]]
        raise ValueError(
            f"row {row}: {names[column]} is not between {limit.least} and {limit.most}"
            + (f" in steps of {limit.unit}" if limit.unit > 1 else "")
        )
    return table
