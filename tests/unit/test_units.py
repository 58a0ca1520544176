# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures as people read them."""

import pytest

from qmp_upm.units import format_seconds, format_setting


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (6960, "6,960 s"),
        (999.6, "1,000 s"),
        (108.2, "108 s"),
        (0.0205, "20.5 ms"),
        (5.12e-7, "0.512 µs"),
        (0, "0 µs"),
    ],
)
def test_seconds_have_three_digits_or_are_whole(seconds: float, text: str) -> None:
    """And never a power of ten."""
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("budget", 134217728, "128 MiB"),
        ("lease", 20.0, "20 s"),
        ("notify", 0.02, "20 ms"),
        ("weight", 100, "100"),
        ("share", None, "null"),
        (
            "policy",
            {"name": "lazy", "max_age": 5.0, "high": 0.8},
            "name = lazy, max_age = 5 s, high = 0.8",
        ),
        ("policy", {"prices": {"conversion": 2e-06}}, "prices = { conversion = 2e-06 }"),
    ],
)
def test_settings_are_shown_as_they_are_written(key: str, value: object, text: str) -> None:
    """In one form everywhere."""
    assert format_setting(key, value) == text
