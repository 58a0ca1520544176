# SPDX-License-Identifier: GPL-2.0-or-later
"""What healthy VMs notice of hostile ones: ``python -m benchmarks.hostile --json``.

The daemon is the installed ``qmp-upm run``, in a process of its own; 50 healthy VMs
(`qmp_upm.testing`) are in another one, and convert ``--runs`` times a second each. Beside them,
for each of the kinds of `benchmarks.hostiles` and then for all of them at once, hostile QEMUs, a
process for each kind, for ``--seconds``; and before it, for as long, processes that take as much of
the processors and speak to nobody. That much is known from a short first look.

``healthy_p99_ratio``
    The healthy VMs' p99 reaction beside the hostile ones, over that beside the silent ones.
``resident_mib_most``
    The daemon's memory, the most of samples five times a second.
``log_bytes_per_second``
    What the daemon logged, for each hostile process.
``status_seconds``
    The longest that query-vms took, asked twice a second on connections of their own.
``states``
    What the daemon says of each hostile VM at the end, counted.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.daemon import PROMPT, Daemon, percentile
from benchmarks.fakes import Load, fakes
from benchmarks.hostiles import KINDS
from qmp_upm.client import connect

CONFIG = """
discovery = ["{folder}/hostile/*.monitor"]
[telemetry]
directory = "{folder}/telemetry"
[metrics]
listen = ""
[control]
socket = "{folder}/control.sock"
[host]
budget = "1 GiB"
[defaults]
policy = {{ {policy} }}
"""
RUN_PAGES = 64
LOOK_SECONDS = 5.0
WATCH_SECONDS = 0.2
STATUS_SECONDS = 0.5
STOP_SECONDS = 20.0
REASON_CHARACTERS = 80


@dataclass
class Watched:
    """What was seen of the daemon meanwhile."""

    resident_mib: float = 0.0
    status_seconds: float = 0.0
    vms: list[dict[str, Any]] = field(default_factory=list)


@contextlib.asynccontextmanager
async def daemon(folder: Path, vms: int) -> AsyncIterator[Daemon]:
    """With its log in FOLDER/log."""
    config = CONFIG.format(folder=folder, policy=PROMPT)
    for i in range(vms):
        config += f'[vms.vm-{i:03}]\nsocket = "{folder}/vm-{i:03}.monitor"\n'
    (folder / "config.toml").write_text(config)
    program = str(Path(sys.executable).with_name("qmp-upm"))
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program, "run", "--config", str(folder / "config.toml"), stderr=log
        )
    try:
        while (folder / "log").read_bytes().count(b'"event": "attached"') < vms:
            if process.returncode is not None:
                raise SystemExit("the daemon ended before all VMs were attached")
            await asyncio.sleep(WATCH_SECONDS)
        yield Daemon(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


@contextlib.asynccontextmanager
async def beside(folder: Path, kinds: list[str]) -> AsyncIterator[list[float]]:
    """These processes; at the end the list has the share of a processor that each took."""
    shares: list[float] = []
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "benchmarks.hostiles", str(folder / "hostile"), kind),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for kind in kinds
    ]
    for process in processes:
        assert process.stdout is not None  # noqa: S101 - a pipe
        await process.stdout.readline()
    try:
        yield shares
    finally:
        for process in processes:
            assert process.stdin is not None  # noqa: S101 - a pipe
            process.stdin.close()
            said, _ = await process.communicate()
            shares.append(json.loads(said)["processor_share"])


async def watch(folder: Path, under: Daemon, seen: Watched) -> None:
    """Until cancelled."""
    due = 0.0
    while True:
        seen.resident_mib = max(seen.resident_mib, under.resident_mib())
        if time.monotonic() >= due:
            due = time.monotonic() + STATUS_SECONDS
            begun = time.monotonic()
            async with connect(folder / "control.sock") as client:
                seen.vms = await client.execute("query-vms")
            seen.status_seconds = max(seen.status_seconds, time.monotonic() - begun)
        await asyncio.sleep(WATCH_SECONDS)


def said_of(vm: dict[str, Any]) -> str:
    """State and reason of a hostile VM, without what differs between two of a kind."""
    trouble = vm["trouble"]
    reason = "" if trouble is None else ": " + re.sub(r"/\S+|\d+", "…", trouble["error"])
    return f"{vm['state']}{reason[:REASON_CHARACTERS]}"


async def measure(folder: Path, kinds: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One kind, or all."""
    (folder / "hostile").mkdir()
    load = Load(options.seconds, float(options.runs * RUN_PAGES), RUN_PAGES)
    look = Load(min(LOOK_SECONDS, options.seconds), load.conversions_per_second, RUN_PAGES)
    async with fakes(folder, 0, options.vms) as guests, daemon(folder, options.vms) as under:
        async with beside(folder, kinds) as shares:
            await guests.load(look)
        silent = [f"burn:{share}" for share in shares]
        async with beside(folder, silent):
            quiet = (await guests.load(load))["reactions_ns"]
        log_bytes, seen = (folder / "log").stat().st_size, Watched()
        watching = asyncio.create_task(watch(folder, under, seen))
        async with beside(folder, kinds):
            loud = (await guests.load(load))["reactions_ns"]
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        logged = (folder / "log").stat().st_size - log_bytes
        return {
            "healthy_p99_ratio": round(percentile(loud, 99) / percentile(quiet, 99), 3),
            "healthy_p99_ms": round(percentile(loud, 99), 1),
            "silent_p99_ms": round(percentile(quiet, 99), 1),
            "healthy_reactions": len(loud),
            "resident_mib_most": round(seen.resident_mib, 1),
            "log_bytes_per_second": round(logged / options.seconds / len(kinds)),
            "status_seconds": round(seen.status_seconds, 3),
            "processor_shares": [round(share, 2) for share in shares],
            "states": Counter(
                said_of(vm) for vm in seen.vms if f"{folder}/hostile/" in vm["socket"]
            ),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What healthy VMs notice of hostile ones.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--vms", type=int, default=50, help="that are healthy")
    parser.add_argument("--runs", type=float, default=4.0, help="of each, a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    parser.add_argument("--kind", choices=[*KINDS, "all"], action="append", help="only this one")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for kind in options.kind or [*KINDS, "all"]:
        with TemporaryDirectory() as folder:
            kinds = list(KINDS) if kind == "all" else [kind]
            results[kind] = asyncio.run(measure(Path(folder), kinds, options))
        results[kind]["load_average"] = round(os.getloadavg()[0], 2)
        if not options.json:
            print(kind, *(f"  {key:22} {value}" for key, value in results[kind].items()), sep="\n")
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
