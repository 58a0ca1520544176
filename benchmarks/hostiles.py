# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that means harm, in a process of its own, for `benchmarks.hostile`.

``python -m benchmarks.hostiles FOLDER KIND`` listens at FOLDER/KIND*.monitor and does what KIND
says until its input ends. ``burn:SHARE`` in place of KIND speaks to nobody, and takes that share of
a processor.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from qmp_upm.testing import FakePlugin, FakeVm, ReplyError
from qmp_upm.testing.faults import Delay, Fault
from qmp_upm.testing.peer import encode

PAGE = 4096
READ_MOST = 1024
CONTAINER_SHIFT = 28
"""A page in each 256 MiB costs the daemon most."""
LISTED_BYTES = 1 << 42
SOCKETS = 100
ERROR_CHARACTERS = 1_900_000
SLOW_SECONDS = 8.0
BLOCK_EVENTS = 256
TICK_SECONDS = 0.01

KINDS = ("events", "regions", "sockets", "errors", "renames", "slow", "leases")
"""Floods of events; regions without end; 100 sockets; errors of 1.9 MB, another each time; another
name at each reconnect; every answer after 8 s; expired leases as fast as they can be sent."""


class Liar(FakePlugin):
    """Has always converted more: in regions that it lists, and in regions that it does not."""

    def __init__(self) -> None:
        super().__init__({"ram": LISTED_BYTES})
        self._numbers = count()

    def __call__(self, command: str, arguments: Mapping[str, Any]) -> object:
        """As the plugin, but for reads."""
        if command != "x-upm-read":
            return super().__call__(command, arguments)
        super().__call__("x-upm-configure", {})  # it renews its lease
        pages = LISTED_BYTES >> CONTAINER_SHIFT
        rows = []
        for _ in range(READ_MOST):
            k = next(self._numbers)
            offset = (k // 2 % pages << CONTAINER_SHIFT) + k // 2 // pages % 65536 * PAGE
            rows.append([1 if k % 2 else 2 + k // 65536 % 65000, offset, PAGE, 1, 1, k, 1])
        return {"cursor": arguments["cursor"] + READ_MOST, "dropped": 0, "records": rows}


class Erring(FakePlugin):
    """Answers x-upm-query with an error that has no end."""

    def __init__(self) -> None:
        super().__init__({"ram": 1 << 30})
        self._numbers = count()

    def __call__(self, command: str, arguments: Mapping[str, Any]) -> object:
        """As the plugin, but for that."""
        if command == "x-upm-query":
            raise ReplyError(f"{next(self._numbers)} " + "x" * ERROR_CHARACTERS)
        return super().__call__(command, arguments)


def _late(what: str) -> Fault | None:
    """Every answer but the greeting."""
    return None if what == "greeting" else Delay(SLOW_SECONDS)


def made(kind: str) -> FakeVm:
    """A VM of that kind."""
    plugin = {"regions": Liar, "errors": Erring}.get(kind, lambda: FakePlugin({"ram": 1 << 30}))()
    plan = _late if kind == "slow" else None
    vm = FakeVm(plugin, plan, name=kind)
    vm.own_process = False
    return vm


async def flood(vm: FakeVm, event: str) -> None:
    """Events as fast as the daemon takes them."""
    block = encode({"timestamp": {"seconds": 0, "microseconds": 0}, "event": event, "data": {}})
    while True:
        link = vm._link  # noqa: SLF001 - it has no door for this
        if link is None or not link.ready:
            await asyncio.sleep(TICK_SECONDS)
            continue
        with contextlib.suppress(ConnectionError):
            link._writer.write(block * BLOCK_EVENTS)  # noqa: SLF001
            await link.drain()
        await asyncio.sleep(0)


async def rename(vm: FakeVm) -> None:
    """Hang up as soon as the daemon is there, and be somebody else."""
    for number in count():
        seen = vm.counts["x-upm-read"]
        while vm.counts["x-upm-read"] == seen:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(TICK_SECONDS)
        vm.name = f"renamed-{number}"
        await vm.hang_up()


async def burn(share: float) -> None:
    """Work for nobody."""
    while True:
        end = time.process_time() + TICK_SECONDS * share
        begun = time.monotonic()
        while time.process_time() < end:
            pass
        await asyncio.sleep(max(0.0, TICK_SECONDS - (time.monotonic() - begun)))


async def serve(folder: Path, kind: str) -> None:
    """Until the input ends; then the processor time that it took is printed."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with contextlib.AsyncExitStack() as stack:
        work: list[asyncio.Task[None]] = []
        if kind.startswith("burn:"):
            work.append(asyncio.create_task(burn(float(kind.removeprefix("burn:")))))
        else:
            for number in range(SOCKETS if kind == "sockets" else 1):
                vm = made(kind)
                path = folder / f"{kind}-{number:03}.monitor"
                await stack.enter_async_context(vm.listening(path))
            if kind in ("events", "leases"):
                name = "X_UPM_LEASE_EXPIRED" if kind == "leases" else "CHATTER"
                work.append(asyncio.create_task(flood(vm, name)))
            elif kind == "renames":
                work.append(asyncio.create_task(rename(vm)))
        print("ready", flush=True)
        begun = time.monotonic()
        before = time.process_time()
        await reader.read()
        used = (time.process_time() - before) / (time.monotonic() - begun)
        print(json.dumps({"processor_share": used}), flush=True)
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))
