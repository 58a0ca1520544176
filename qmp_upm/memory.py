# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory of the daemon's process: of one size for months, and no VM waits long for it.

All VMs wait while Python looks for garbage in cycles. It does so by the number of new objects, and
what it then finds, more each time, are ledgers, which are none. So it looks once a minute, at all
that was not imported: what VMs leave that are gone is found then. It looks in between if so much is
new that this would be late.

malloc(3) raises its thresholds with each large block that is freed. It then puts large blocks among
small ones, and what is free of them is not given back. Here the thresholds stay.
"""

import asyncio
import ctypes
import gc

COLLECT_SECONDS = 60.0
NEW_OBJECTS = 100_000
"""In between: some 20 MB."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
MALLOC_BYTES = 128 << 10
"""Where glibc's thresholds begin."""


def settle() -> None:
    """Have it so from now on, for the whole process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc only
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MALLOC_BYTES)
        mallopt(M_TRIM_THRESHOLD, MALLOC_BYTES)
    gc.set_threshold(NEW_OBJECTS)
    gc.collect()
    gc.freeze()


async def collect_regularly() -> None:
    """Find the garbage of all ages, until cancelled."""
    while True:
        await asyncio.sleep(COLLECT_SECONDS)
        gc.collect()
