# SPDX-License-Identifier: GPL-2.0-or-later
"""The messages of the plugin's QMP dialect, protocol 1.

QEMU is not trusted: whatever a peer sends becomes one of these models or a MessageError. Keys that
a newer plugin may add are ignored. Sizes and offsets are bytes, times nanoseconds of the host's
CLOCK_MONOTONIC.
"""

from enum import StrEnum
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictInt, ValidationError

from qmp_upm.errors import MessageError
from qmp_upm.records import OFFSET, REGION, SIZE, Limits, Records, read_records, read_table

PROTOCOL = 1
COMMANDS = frozenset(
    {"x-upm-query", "x-upm-configure", "x-upm-read", "x-upm-stale", "x-upm-discard"}
)
READ_MOST = 1024
"""Records asked for at a time. They are worked off in one go, for which all other VMs wait."""
RING_RECORDS = 16384
"""Records that the plugin keeps for a daemon that doesn't read: ``plugin/upm.h``."""
STALE_MOST = 16384
"""Ranges that a reply of x-upm-stale has at most."""

Count = Annotated[StrictInt, Field(ge=0, lt=1 << 64)]


def _within(limits: Limits) -> Any:
    return Field(ge=limits.least, le=limits.most, multiple_of=limits.unit)


Offset = Annotated[StrictInt, _within(OFFSET)]
Size = Annotated[StrictInt, _within(SIZE)]
RegionId = Annotated[StrictInt, _within(REGION)]


class Copy(StrEnum):
    """One of the two backings of a page."""

    PRIVATE = "private"
    SHARED = "shared"

    @property
    def other(self) -> "Copy":
        """The copy that a conversion leaves when this one becomes live."""
        return Copy.SHARED if self is Copy.PRIVATE else Copy.PRIVATE


class Message(BaseModel):
    """What came from QEMU: immutable, and open to keys we do not know."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )


class Region(Message):
    """One backing of guest RAM."""

    id: RegionId
    name: Annotated[str, Field(max_length=256)]
    size: Size
    backing: Annotated[str, Field(max_length=32)]
    """``memfd``, ``file``, ``anonymous``, ``hugetlb``, ``in-place``, or ``unknown``."""
    state: Annotated[str, Field(max_length=32)] = "followed"
    """Or ``failing``, while the host refuses discards there, or ``lost``: not followed any more.
    A plugin of release 0.1.0 does not say."""
    stale_private: Count
    stale_shared: Count


class Stale(Message):
    """Stale bytes by copy, and the most there ever were of both together."""

    private: Count
    shared: Count
    peak: Count


class RecordLog(Message):
    """The plugin's record of conversions: ``head`` is the number of the next one."""

    head: Count
    oldest: Count
    dropped: Count


class Query(Message):
    """Answer to x-upm-query."""

    version: Annotated[str, Field(max_length=64)]
    protocol: Count
    vm_kind: Annotated[str, Field(max_length=32)]
    conversion: Annotated[str, Field(max_length=32)]
    launching: bool = False
    """No processor of the VM has run since it was made or rebuilt: nothing is discarded."""
    regions: Annotated[list[Region], Field(max_length=512)]
    stale: Stale
    records: RecordLog
    counters: Annotated[dict[Annotated[str, Field(max_length=64)], Count], Field(max_length=256)]
    latency_ns: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[list[Count], Field(max_length=64)]],
        Field(max_length=16, default_factory=dict),
    ]


class Read(Message):
    """Answer to x-upm-read: records from the cursor on, and how many had been overwritten."""

    cursor: Count
    dropped: Count
    records: Annotated[Records, PlainValidator(partial(read_records, most=READ_MOST))]


class StaleRanges(Message):
    """Answer to x-upm-stale: runs as rows of offset and size, and where to go on."""

    ranges: Annotated[
        NDArray[np.int64],
        PlainValidator(
            partial(read_table, limits={"offset": OFFSET, "size": SIZE}, most=STALE_MOST)
        ),
    ]
    cursor: Offset
    done: bool


class Discarded(Message):
    """Event X_UPM_DISCARDED: what became of a discard request."""

    id: Count
    discarded: Count
    skipped: Count
    error: Annotated[str, Field(max_length=256)] | None


class CommandInfo(Message):
    """A line of query-commands."""

    name: str


class BudgetReached(Message):
    """Event X_UPM_BUDGET_REACHED: a discard went through that should have waited."""

    stale: Count
    budget: Count


class Nudge(Message):
    """An event that only says that something happened, X_UPM_CONVERSIONS or X_UPM_LEASE_EXPIRED."""


class Event(NamedTuple):
    """One of the plugin's events, and what it says."""

    event: str
    data: Message


EVENTS: dict[str, type[Message]] = {
    "X_UPM_CONVERSIONS": Nudge,
    "X_UPM_DISCARDED": Discarded,
    "X_UPM_LEASE_EXPIRED": Nudge,
    "X_UPM_BUDGET_REACHED": BudgetReached,
}
"""Those that we know; others are ignored."""


Model = TypeVar("Model", bound=Message)
Mode = Literal["eager", "defer"]


def read_message(model: type[Model], value: object) -> Model:
    """``value`` as a ``model``; raises MessageError that names the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise MessageError(
            f"{model.__name__} from QEMU is malformed: {where}: {first['msg']}",
            hint="check that the plugin in QEMU and this daemon are of the same release",
        ) from error
