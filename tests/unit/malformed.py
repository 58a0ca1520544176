# SPDX-License-Identifier: GPL-2.0-or-later
"""The matrix: what a faulty or hostile QEMU may send, and what becomes of its session then."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qmp_upm.testing import Close, Drop, Fault, Flood, Garbage, GiantLine, Split

PAGE = 4096
MIB = 1 << 20


class Outcome(Enum):
    """What becomes of the session."""

    GOES_ON = "on the same connection"
    AGAIN = "on another connection"


@dataclass(frozen=True)
class Rewrite(Fault):
    """What ``change`` makes of the message: bytes go as they are, anything else as JSON."""

    change: Callable[[dict[str, Any]], object]

    async def send(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        """Send that instead."""
        message = self.change(json.loads(line))
        writer.write(
            message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        )


def returns(value: object) -> Fault:
    """The reply with another return value."""
    return Rewrite(lambda message: message | {"return": value})


def changed(**fields: object) -> Fault:
    """The reply with other fields in what it returns; ``_`` stands for ``-``."""
    new = {key.replace("_", "-"): value for key, value in fields.items()}
    return Rewrite(lambda message: message | {"return": message["return"] | new})


def without(key: str) -> Fault:
    """The reply without one field."""

    def remove(message: dict[str, Any]) -> object:
        del message["return"][key]
        return message

    return Rewrite(remove)


def region(**fields: object) -> Fault:
    """A query whose only region has other fields."""
    new = {key.replace("_", "-"): value for key, value in fields.items()}

    def change(message: dict[str, Any]) -> object:
        message["return"]["regions"][0] |= new
        return message

    return Rewrite(change)


def record(*row: object) -> Fault:
    """A read that returns this one record, with a cursor to match."""

    def change(message: dict[str, Any]) -> object:
        message["return"] |= {"records": [row], "cursor": message["return"]["cursor"] + 1}
        return message

    return Rewrite(change)


def twice(message: dict[str, Any]) -> bytes:
    """The same reply two times."""
    return (json.dumps(message).encode() + b"\n") * 2


def event(name: object, data: object, count: int = 1) -> Fault:
    """The reply behind events."""
    return Flood(count, json.dumps({"event": name, "data": data}).encode() + b"\n")


AGAIN, GOES_ON = Outcome.AGAIN, Outcome.GOES_ON
Case = tuple[str, Fault, Outcome]

SYNTAX: dict[str, Case] = {
    "no JSON": ("x-upm-query", Garbage(b"not json\n"), AGAIN),
    "single quotes": ("x-upm-query", Garbage(b"{'return': {}}\n"), AGAIN),
    "half a message": ("x-upm-query", Garbage(b'{"return": \n'), AGAIN),
    "two in a line": ("x-upm-query", Rewrite(lambda m: (json.dumps(m) * 2 + "\n").encode()), AGAIN),
    "an array": ("x-upm-query", Garbage(b"[]\n"), AGAIN),
    "a number": ("x-upm-query", Garbage(b"5\n"), AGAIN),
    "NaN": ("x-upm-query", changed(protocol=float("nan")), AGAIN),
    "a number of 5,000 digits": (
        "x-upm-query",
        Garbage(b'{"return": ' + b"9" * 5000 + b"}\n"),
        AGAIN,
    ),
    "NUL": ("x-upm-query", Garbage(b"\x00\n"), AGAIN),
    "NUL in a message": ("x-upm-read", Garbage(b'{"return": \x00{}}\n'), AGAIN),
    "bad UTF-8": ("x-upm-query", Garbage(b"\xff\xfe\n"), AGAIN),
    "bad UTF-8 in a string": ("x-upm-query", Garbage(b'{"return": "\xc3\x28"}\n'), AGAIN),
    "a lone surrogate": ("x-upm-query", changed(version="\ud800"), AGAIN),
    "byte order mark": ("x-upm-query", Garbage(b"\xef\xbb\xbf{}\n"), AGAIN),
    "empty lines": ("x-upm-read", Garbage(b"\n" * 1000), AGAIN),
    "nested lists": ("x-upm-query", Garbage(b"[" * 200_000 + b"\n"), AGAIN),
    "nested objects": ("x-upm-read", Garbage(b'{"a":' * 100_000 + b"\n"), AGAIN),
    "nested, and closed": (
        "x-upm-read",
        Garbage(b'{"return": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
        AGAIN,
    ),
    "a giant line": ("x-upm-read", GiantLine(64 * MIB), AGAIN),
    "a giant line at first": ("greeting", GiantLine(64 * MIB), AGAIN),
    "an endless line": ("x-upm-query", GiantLine(256 * MIB, ended=False), AGAIN),
    "byte by byte": ("x-upm-query", Split(1), GOES_ON),
}

PROTOCOL: dict[str, Case] = {
    "an empty object": ("x-upm-query", Garbage(b"{}\n"), AGAIN),
    "no id": ("x-upm-query", Rewrite(lambda m: {"return": m["return"]}), AGAIN),
    "another id": ("x-upm-query", Rewrite(lambda m: m | {"id": 7}), AGAIN),
    "id null": ("x-upm-read", Rewrite(lambda m: m | {"id": None}), AGAIN),
    "id a list": ("x-upm-read", Rewrite(lambda m: m | {"id": []}), AGAIN),
    "id an object": ("x-upm-query", Rewrite(lambda m: m | {"id": {}}), AGAIN),
    "twice": ("x-upm-read", Rewrite(twice), GOES_ON),
    "twice at first": ("qmp_capabilities", Rewrite(twice), GOES_ON),
    "never": ("x-upm-read", Drop(), AGAIN),
    "never at first": ("x-upm-query", Drop(), AGAIN),
    "no greeting": ("greeting", Drop(), AGAIN),
    "greeting a number": ("greeting", Garbage(b"5\n"), AGAIN),
    "greeting without QMP": ("greeting", Garbage(b"{}\n"), AGAIN),
    "greeting of wrong types": ("greeting", Garbage(b'{"QMP": 5}\n'), AGAIN),
    "version of wrong types": (
        "greeting",
        Garbage(b'{"QMP": {"version": [], "capabilities": ["oob"]}}\n'),
        AGAIN,
    ),
    "capabilities of wrong types": (
        "greeting",
        Garbage(b'{"QMP": {"version": {}, "capabilities": 5}}\n'),
        AGAIN,
    ),
    "greeting without oob": (
        "greeting",
        Garbage(b'{"QMP": {"version": {}, "capabilities": []}}\n'),
        GOES_ON,
    ),
    "negotiation refused": ("qmp_capabilities", Rewrite(lambda _: {"error": {}}), AGAIN),
    "negotiation unanswered": ("qmp_capabilities", Drop(), AGAIN),
    "an event instead": ("x-upm-read", Garbage(b'{"event": "X_UPM_CONVERSIONS"}\n'), AGAIN),
    "both return and error": ("x-upm-read", Rewrite(lambda m: m | {"error": {}}), AGAIN),
    "error a number": ("x-upm-read", Rewrite(lambda m: {"error": 5, "id": m["id"]}), AGAIN),
    "error without text": (
        "x-upm-read",
        Rewrite(lambda m: {"error": {"class": "GenericError"}, "id": m["id"]}),
        AGAIN,
    ),
    "error of wrong types": (
        "x-upm-read",
        Rewrite(lambda m: {"error": {"class": 5, "desc": []}, "id": m["id"]}),
        AGAIN,
    ),
    "error without id": (
        "x-upm-read",
        Rewrite(lambda _: {"error": {"class": "GenericError", "desc": "?"}}),
        AGAIN,
    ),
    "closed at first": ("greeting", Close(), AGAIN),
    "closed in mid-greeting": ("greeting", Close(9), AGAIN),
    "closed in mid-reply": ("x-upm-read", Close(9), AGAIN),
    "closed behind a reply": ("x-upm-read", Close(1 << 20), AGAIN),
}

TYPES: dict[str, Case] = {
    f"{command} returns {value!r}"[:60]: (command, returns(value), AGAIN)
    for command in ("query-commands", "x-upm-query", "x-upm-read", "x-upm-stale")
    for value in (None, True, 5, 0.5, "x", [5], {"a": {}}, [[]])
} | {
    "query without regions": ("x-upm-query", without("regions"), AGAIN),
    "query without counters": ("x-upm-query", without("counters"), AGAIN),
    "query without records": ("x-upm-query", without("records"), AGAIN),
    "query with more": ("x-upm-query", changed(news={"a": [1, 2]}), GOES_ON),
    "read without cursor": ("x-upm-read", without("cursor"), AGAIN),
    "read with more": ("x-upm-read", changed(news=5), GOES_ON),
    "stale without done": ("x-upm-stale", without("done"), AGAIN),
    "a version of a megabyte": ("x-upm-query", changed(version="x" * MIB), AGAIN),
    "a protocol of the future": ("x-upm-query", changed(protocol=99), AGAIN),
    "protocol true": ("x-upm-query", changed(protocol=True), AGAIN),
    "counters of wrong types": ("x-upm-query", changed(counters={"commands": "5"}), AGAIN),
    "10,000 counters": (
        "x-upm-query",
        changed(counters={f"c{i}": 1 for i in range(10_000)}),
        AGAIN,
    ),
}

LIES: dict[str, Case] = {
    "10,000 regions": ("x-upm-query", changed(regions=[{"id": 1}] * 10_000), AGAIN),
    "region 0": ("x-upm-query", region(id=0), AGAIN),
    "region 65,536": ("x-upm-query", region(id=1 << 16), AGAIN),
    "a negative size": ("x-upm-query", region(size=-PAGE), AGAIN),
    "half a page": ("x-upm-query", region(size=PAGE // 2), AGAIN),
    "a size of an exabyte": ("x-upm-query", region(size=1 << 60), AGAIN),
    "oldest beyond head": (
        "x-upm-query",
        changed(records={"head": 1, "oldest": 2, "dropped": 0}),
        AGAIN,
    ),
    "a head of the future": (
        "x-upm-query",
        changed(records={"head": 1 << 62, "oldest": 0, "dropped": 0}),
        AGAIN,
    ),
    "a head beyond 64 bits": (
        "x-upm-query",
        changed(records={"head": 1 << 200, "oldest": 0, "dropped": 0}),
        AGAIN,
    ),
    "a record beyond the end": ("x-upm-read", record(1, 64 * MIB, PAGE, 1, 1, 5, 1), AGAIN),
    "a record across the end": ("x-upm-read", record(1, 63 * MIB, 2 * MIB, 1, 1, 5, 1), AGAIN),
    "a record of no region": ("x-upm-read", record(0, 0, PAGE, 1, 1, 5, 1), AGAIN),
    "a record of nothing": ("x-upm-read", record(1, 0, 0, 1, 1, 5, 1), AGAIN),
    "a record of half a page": ("x-upm-read", record(1, 0, 2048, 1, 1, 5, 1), AGAIN),
    "a record before the start": ("x-upm-read", record(1, -PAGE, PAGE, 1, 1, 5, 1), AGAIN),
    "a record beyond 64 bits": ("x-upm-read", record(1, 1 << 64, PAGE, 1, 1, 5, 1), AGAIN),
    "a record to a third state": ("x-upm-read", record(1, 0, PAGE, 2, 1, 5, 1), AGAIN),
    "a record of six": ("x-upm-read", record(1, 0, PAGE, 1, 1, 5), AGAIN),
    "a record of strings": ("x-upm-read", record(*"1011151"), AGAIN),
    "a record of floats": ("x-upm-read", record(1.0, 0.0, 4096.0, 1, 1, 5, 1), AGAIN),
    "a record of true": ("x-upm-read", record(True, 0, PAGE, True, True, 5, True), AGAIN),
    "a record an object": ("x-upm-read", changed(records=[{}], cursor=1), AGAIN),
    "a cursor that stands still": (
        "x-upm-read",
        changed(records=[[1, 0, PAGE, 1, 1, 5, 1]], cursor=0),
        AGAIN,
    ),
    "a cursor that goes back": ("x-upm-read", changed(cursor=-1), AGAIN),
    "a cursor that jumps": ("x-upm-read", changed(cursor=1 << 40), AGAIN),
    "more records than asked for": (
        "x-upm-read",
        changed(records=[[1, 0, PAGE, 1, 1, 5, 1]] * 5000, cursor=5000),
        AGAIN,
    ),
    "stale beyond the end": (
        "x-upm-stale",
        changed(ranges=[[64 * MIB, PAGE]]),
        AGAIN,
    ),
    "stale that begins again": (
        "x-upm-stale",
        changed(cursor=0, done=False),
        AGAIN,
    ),
    "stale that never ends": (
        "x-upm-stale",
        changed(ranges=[], cursor=PAGE, done=False),
        AGAIN,
    ),
    "100,000 stale ranges": ("x-upm-stale", changed(ranges=[[0, PAGE]] * 100_000), AGAIN),
}

EVENTS: dict[str, Case] = {
    "event a number": ("x-upm-read", event(3, {}), GOES_ON),
    "event null": ("x-upm-read", event(None, {}), GOES_ON),
    "data a list": ("x-upm-read", event("X_UPM_CONVERSIONS", []), AGAIN),
    "a name of a megabyte": ("x-upm-read", event("X_UPM_" + "x" * MIB, {}), GOES_ON),
    "discarded without data": ("x-upm-read", event("X_UPM_DISCARDED", {}), AGAIN),
    "discarded of wrong types": (
        "x-upm-read",
        event("X_UPM_DISCARDED", {"id": "1", "discarded": -1, "skipped": None, "error": 5}),
        AGAIN,
    ),
    "discarded, unasked": (
        "x-upm-read",
        event("X_UPM_DISCARDED", {"id": 1, "discarded": 1, "skipped": 0, "error": None}),
        GOES_ON,
    ),
    "an event that we do not know": ("x-upm-read", event("X_UPM_NEWS", {"a": 1}), GOES_ON),
    "a flood of bells": (
        "x-upm-read",
        event("X_UPM_CONVERSIONS", {"cursor": 1, "dropped": 0}, 1000),
        GOES_ON,
    ),
    "a flood of leases": ("x-upm-read", event("X_UPM_LEASE_EXPIRED", {"stale": 0}, 1000), GOES_ON),
    "a flood of others": ("x-upm-read", event("NICE", {"a": "b" * 100}, 1000), GOES_ON),
    "a flood at first": ("greeting", event("NICE", {}, 1000), AGAIN),
    "a flood of replies": ("x-upm-read", Flood(1000, b'{"return": {}, "id": "x"}\n'), GOES_ON),
}

MATRIX = SYNTAX | PROTOCOL | TYPES | LIES | EVENTS


NASTY: list[object] = [
    *(None, True, "", "\x00", "\ud800", "x" * 5000, [], {}, [[]], [{}], {"id": 1}),
    *(-1, 0, 1, 4095, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 1 << 200, -(1 << 63), 0.5, 1e300),
]


def mutated(message: object, how: str, at: int, value: object) -> object:
    """The message with ``value`` put in place of, beside, or without, its ``at``-th part."""
    parts: list[tuple[Any, Any]] = []
    waiting = [message]
    while waiting:
        inner = waiting.pop()
        keys: list[Any] = []
        if isinstance(inner, dict):
            keys = list(inner)
        elif isinstance(inner, list):
            keys = list(range(min(len(inner), 8)))
        parts += [(inner, key) for key in keys]
        waiting += [inner[key] for key in keys]
    holder, key = parts[at % len(parts)]
    if how == "replace":
        holder[key] = value
    elif how == "delete":
        del holder[key]
    elif isinstance(holder, dict):
        holder[f"{key}-more"] = value
    else:
        holder.insert(key, value)
    return message
