# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's picture of what a VM holds, short enough to be compared with the plugin's ledger.

By copy and region: bytes, runs, and a digest of the runs, so that two who know the same pages can
tell, and no address of a guest's memory leaves the daemon.
"""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from qmp_upm.ledger import Ledger
from qmp_upm.pages import PAGE_BYTES, Ints
from qmp_upm.protocol import Copy


@dataclass(frozen=True)
class Held:
    """Stale copies in one region. ``digest``: of the runs, as `digest_of` has it."""

    copy: Copy
    region: int
    bytes: int
    runs: int
    digest: str


def picture(ledger: Ledger) -> list[Held]:
    """What is held of each copy and region in which something is stale, in order."""
    found = []
    for copy in Copy:
        runs = ledger.stale(copy).runs()
        for region in sorted(set(runs.region.tolist())):
            own = runs.region == region
            offset, size = runs.first[own] * PAGE_BYTES, runs.pages[own] * PAGE_BYTES
            held = int(size.sum())
            found.append(Held(copy, region, held, len(size), digest_of(offset, size)))
    return found


def digest_of(offset: Ints, size: Ints) -> str:
    """SHA-256 of merged runs in order: offset and size in bytes, 64 bits each, little-endian."""
    return sha256(np.column_stack((offset, size)).astype("<i8").tobytes()).hexdigest()
