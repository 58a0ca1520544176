# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes and durations as people write them: ``"64 MiB"``, ``"50 ms"``."""

import json
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DURATIONS = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

NSEC = 1_000_000_000
"""Nanoseconds in a second."""


def _parse(value: object, units: dict[str, float] | dict[str, int], example: str) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not understood; write, for example, {example!r}")  # noqa: TRY004 - a TypeError is none of pydantic's
    if not isinstance(value, str):
        return value
    match = _NUMBER.fullmatch(value)
    if match is None or match[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(
            f"{value!r} is not understood; write a number and a unit of {known}, "
            f"for example {example!r}"
        )
    return float(match[1]) * units[match[2]]


def parse_size(value: object) -> object:
    """Bytes of a text such as ``"64 MiB"``; anything else is returned as it is.

    Raises ValueError on an unknown unit or a fraction of a byte.
    """
    size = _parse(value, _SIZES, "64 MiB")
    if isinstance(size, float):
        if not size.is_integer():
            raise ValueError(f"{value!r} is not a whole number of bytes")
        return int(size)
    return size


def parse_duration(value: object) -> object:
    """Seconds of a text such as ``"50 ms"``; anything else is returned as it is."""
    return _parse(value, _DURATIONS, "50 ms")


def format_size(size: int) -> str:
    """Shortest exact-looking form with three digits at most after the point."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:  # noqa: PLR2004 - the ratio of neighbouring units
            return f"{value:.0f} {unit}" if value.is_integer() else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _json_schema(kind: str, units: dict[str, float] | dict[str, int]) -> WithJsonSchema:
    pattern = rf"^\s*\d+(\.\d+)?\s*({'|'.join(unit for unit in units if unit)})?\s*$"
    return WithJsonSchema(
        {"anyOf": [{"type": kind, "minimum": 0}, {"type": "string", "pattern": pattern}]},
        mode="validation",
    )


def format_seconds(value: float) -> str:
    """Three digits, or whole seconds: ``"1,840 s"``, ``"20.5 ms"``, ``"0.512 µs"``."""
    if value >= 999.5:  # noqa: PLR2004 - would round to four digits
        return f"{value:,.0f} s"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def format_duration(seconds: float) -> str:
    """Two units at most, rounded down: ``"3 d 4 h"``, ``"12 s"``, ``"20 ms"``."""
    if seconds < 1:
        return f"{int(seconds * 1000)} ms"
    left, parts = int(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


SIZES = frozenset({"budget", "share", "hold_bytes", "max_bytes"})
TIMES = frozenset({"lease", "notify", "max_age", "max_delay"})


def format_setting(key: str, value: object) -> str:
    """A setting as a person writes it: sizes and times with their units, else as in JSON."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if key in SIZES:
            return format_size(int(value))
        if key in TIMES:
            return format_seconds(value)
    if isinstance(value, Mapping):
        parts = ((name, format_setting(name, one), one) for name, one in value.items())
        return ", ".join(
            f"{name} = {{ {text} }}" if isinstance(one, Mapping) else f"{name} = {text}"
            for name, text, one in parts
        )
    return value if isinstance(value, str) else json.dumps(value)


Bytes = Annotated[
    int,
    BeforeValidator(parse_size),
    Field(ge=0, lt=1 << 63),
    _json_schema("integer", _SIZES),
]
"""A number of bytes; accepts a text with a unit."""

Seconds = Annotated[
    float,
    BeforeValidator(parse_duration),
    Field(gt=0, le=86400, allow_inf_nan=False),
    _json_schema("number", _DURATIONS),
]
"""A duration in seconds, more than none and a day at most; accepts a text with a unit."""
