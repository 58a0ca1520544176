# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU with the plugin, for tests that tell it what to convert."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest import Guest


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Any]:
    """``guest(*arguments, **how)``: a Guest, closed at the end.

    Its monitor works on the thread's event loop, and leaves one behind if it has to make it.
    """
    started: list[Guest] = []
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)

    def start(*arguments: str, **how: Any) -> Guest:
        started.append(Guest(tmp_path, *arguments, **how))
        return started[-1]

    yield start
    for one in started:
        one.close()
    loop.close()
    asyncio.set_event_loop(None)
