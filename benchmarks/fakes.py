# SPDX-License-Identifier: GPL-2.0-or-later
"""A process full of fake VMs for `benchmarks.daemon` and `benchmarks.soak`.

``python -m benchmarks.fakes FOLDER FIRST COUNT`` makes VMs with monitors FOLDER/vm-NNN.monitor.
Each line of its input is a load, as JSON, that it puts on them for a time; each line of its output
is what came of it.
"""

import asyncio
import contextlib
import gc
import json
import math
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qmp_upm.testing import FakePlugin, FakeVm
from qmp_upm.units import NSEC

PAGE = 4096
REGION_BYTES = 1 << 30
WINDOW_RUNS = 256
TURN_VMS = 8
PASS_SECONDS = 0.01
"""Between two looks at who has something to convert."""
SETTLE_SECONDS = 2.0
"""How long the daemon may take to react to the last of a load."""


@dataclass(frozen=True)
class Load:
    """What each VM's guest does for ``seconds``.

    ``conversions_per_second`` pages of 4 KiB, converted one by one in runs of ``run_pages``
    neighbours, which the plugin records as one; with a gap between two runs, so that these are not
    merged. A window of runs is shared, then unshared, and so on.
    """

    seconds: float
    conversions_per_second: float
    run_pages: int


class TimedPlugin(FakePlugin):
    """Notes how long after a conversion the daemon's decision on it arrives, as a discard."""

    def __init__(self) -> None:
        super().__init__({"ram": REGION_BYTES})
        self.reactions_ns: list[int] = []
        self._since_ns: int | None = None
        self._runs = 0

    def __call__(self, command: str, arguments: Mapping[str, Any]) -> object:
        """As the plugin."""
        if command == "x-upm-discard" and self._since_ns is not None:
            self.reactions_ns.append(time.monotonic_ns() - self._since_ns)
            self._since_ns = None
        return super().__call__(command, arguments)

    def convert_run(self, pages: int) -> None:
        """The next run of the window."""
        if self._since_ns is None:
            self._since_ns = time.monotonic_ns()
        at = self._runs % WINDOW_RUNS
        unshare = self._runs // WINDOW_RUNS % 2 == 0
        size = pages * PAGE
        self.convert(1, at * (size + PAGE), size, to_private=unshare, count=pages)
        self._runs += 1

    @property
    def unanswered(self) -> bool:
        """Whether it waits for a reaction, of a daemon that has shown some."""
        return self._since_ns is not None and bool(self.reactions_ns)

    def totals(self) -> dict[str, int]:
        """Conversions, records, drops and expired leases so far."""
        counters, ring = self.ledger.counters, self.ledger.ring
        return {
            "conversions": counters["conversions-to-private"] + counters["conversions-to-shared"],
            "records": ring.head,
            "dropped": ring.dropped,
            "lease_expiries": counters["lease-expiries"],
        }


async def put_load(plugins: list[TimedPlugin], load: Load) -> None:
    """Every VM's share of it. The VMs take turns, and what the daemon sends comes in between."""
    end = time.monotonic() + load.seconds
    runs_per_second = load.conversions_per_second / load.run_pages
    last = dict.fromkeys(plugins, time.monotonic())
    owed = {plugin: random.random() for plugin in plugins}  # noqa: S311 - guests keep no common time
    while time.monotonic() < end:
        for i, plugin in enumerate(plugins):
            now = time.monotonic()
            owed[plugin] += (now - last[plugin]) * runs_per_second
            last[plugin] = now
            for _ in range(math.floor(owed[plugin])):
                plugin.convert_run(load.run_pages)
            owed[plugin] %= 1
            if i % TURN_VMS == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(PASS_SECONDS)


async def settle(plugins: list[TimedPlugin]) -> None:
    """Wait for the last reactions, which are this load's and not the next one's."""
    for _ in range(round(SETTLE_SECONDS / PASS_SECONDS)):
        if not any(plugin.unanswered for plugin in plugins):
            return
        await asyncio.sleep(PASS_SECONDS)


async def serve(folder: Path, first: int, count: int) -> None:
    """Until the input ends."""
    plugins = [TimedPlugin() for _ in range(count)]
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with contextlib.AsyncExitStack() as stack:
        for i, plugin in enumerate(plugins, first):
            vm = FakeVm(plugin, name=f"vm-{i:03}")
            await stack.enter_async_context(vm.listening(folder / f"vm-{i:03}.monitor"))
        gc.disable()  # it would look at all the records, which are lists
        print("ready", flush=True)
        while line := await reader.readline():
            before = [plugin.totals() for plugin in plugins]
            begun, cpu = time.monotonic_ns(), time.process_time()
            await put_load(plugins, Load(**json.loads(line)))
            seconds = (time.monotonic_ns() - begun) / NSEC
            after = [plugin.totals() for plugin in plugins]
            report = {
                key: sum(t[key] for t in after) - sum(t[key] for t in before) for key in after[0]
            }
            report["fakes_cpu_percent"] = round(100 * (time.process_time() - cpu) / seconds)
            await settle(plugins)
            reactions = sorted(ns for plugin in plugins for ns in plugin.reactions_ns)
            for plugin in plugins:
                plugin.reactions_ns.clear()
            print(json.dumps({"seconds": seconds, "reactions_ns": reactions, **report}), flush=True)


class Fakes:
    """Such a process, from outside."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def load(self, load: Load) -> dict[str, Any]:
        """Put it on the VMs; what came of it."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None  # noqa: S101 - a pipe
        assert stdout is not None  # noqa: S101 - a pipe
        stdin.write(json.dumps(asdict(load)).encode() + b"\n")
        report: dict[str, Any] = json.loads(await stdout.readline())
        return report


@contextlib.asynccontextmanager
async def fakes(folder: Path, first: int, count: int) -> Any:
    """A process with these VMs, listening."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.fakes", str(folder), str(first), str(count)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=64 << 20,
    )
    assert process.stdout is not None  # noqa: S101 - a pipe
    await process.stdout.readline()
    try:
        yield Fakes(process)
    finally:
        assert process.stdin is not None  # noqa: S101 - a pipe
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
