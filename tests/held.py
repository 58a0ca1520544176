# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin's ledger as the daemon tells its picture of it: `qmp_upm.picture`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from qmp_upm.picture import digest_of
from qmp_upm.protocol import STALE_MOST, Copy


def held_by_plugin(cmd: Callable[..., Any]) -> set[tuple[object, ...]]:
    """By copy and region: bytes, runs and digest, read from the plugin of a real or a fake VM.

    ``cmd``: gives a command with its arguments to a monitor of the test's own.
    """
    found: set[tuple[object, ...]] = set()
    for region in cmd("x-upm-query")["regions"]:
        for copy in Copy:
            ranges, at, done = [], 0, False
            while not done:
                part = cmd("x-upm-stale", copy=copy, region=region["id"], cursor=at, max=STALE_MOST)
                ranges += part["ranges"]
                at, done = part["cursor"], part["done"]
            if ranges:
                offset, size = np.array(ranges).T
                digest = digest_of(offset, size)
                found.add((copy, region["id"], int(size.sum()), len(size), digest))
    return found
