# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm`` whose asyncio tasks are counted: ``python -m benchmarks.counted FILE ARGUMENTS``.

Every second a thread writes the number of tasks of the daemon's event loop into FILE.
"""

import asyncio
import sys
import threading
import time
from pathlib import Path

from qmp_upm.cli import app


class _NotingPolicy(asyncio.DefaultEventLoopPolicy):
    """Remembers the loop that it made last."""

    loop: asyncio.AbstractEventLoop | None = None

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """One more."""
        self.loop = super().new_event_loop()
        return self.loop


def _count(policy: _NotingPolicy, file: Path) -> None:
    while True:
        time.sleep(1)
        if policy.loop is not None:
            file.write_text(str(len(asyncio.all_tasks(policy.loop))))


def main() -> None:
    """Run the command line with the counter beside it."""
    policy = _NotingPolicy()
    asyncio.set_event_loop_policy(policy)
    file = Path(sys.argv.pop(1))
    threading.Thread(target=_count, args=(policy, file), daemon=True).start()
    app()


if __name__ == "__main__":
    main()
