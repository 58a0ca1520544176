# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures as people read them."""

import pytest

from qmp_upm.units import format_seconds


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
