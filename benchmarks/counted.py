# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm`` that tells what it holds: ``python -m benchmarks.counted FILE ARGUMENTS``.

Every second a thread writes into FILE, as JSON, the number of tasks of the daemon's event loop, the
MiB of its heap that are in use, and the thousands of Python objects. What the process has beyond
these is free memory that the allocators keep.
"""

import asyncio
import ctypes
import json
import sys
import threading
import time
from pathlib import Path

from qmp_upm.cli import app


class _Heap(ctypes.Structure):
    """struct mallinfo2, mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


class _NotingPolicy(asyncio.DefaultEventLoopPolicy):
    """Remembers the loop that it made last."""

    loop: asyncio.AbstractEventLoop | None = None

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """One more."""
        self.loop = super().new_event_loop()
        return self.loop


def _count(policy: _NotingPolicy, file: Path) -> None:
    heap = ctypes.CDLL("libc.so.6").mallinfo2
    heap.restype = _Heap
    while True:
        time.sleep(1)
        if policy.loop is None:
            continue
        now = heap()
        counts = {
            "tasks": len(asyncio.all_tasks(policy.loop)),
            "heap_mib": (now.uordblks + now.hblkhd) / (1 << 20),
            "kilo_objects": sys.getallocatedblocks() / 1000,
        }
        written = file.with_suffix(".new")
        written.write_text(json.dumps(counts))
        written.rename(file)


def main() -> None:
    """Run the command line with the counter beside it."""
    policy = _NotingPolicy()
    asyncio.set_event_loop_policy(policy)
    file = Path(sys.argv.pop(1))
    threading.Thread(target=_count, args=(policy, file), daemon=True).start()
    app()


if __name__ == "__main__":
    main()
