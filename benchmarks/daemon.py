# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon costs with a host full of VMs: ``python -m benchmarks.daemon --json``.

The daemon is the installed ``qmp-upm run``, in a process of its own; 256 fake VMs
(`qmp_upm.testing`, checked against the real plugin by a test) are in another one, and one more VM,
which can flood, in a third. Three phases:

idle
    Nothing converts, for ``--seconds``. ``idle_cpu_percent`` is of one core.
load
    1,000,000 conversions of 4 KiB a second in total, 3,906 a VM. A guest converts a buffer page by
    page, and the plugin records neighbours as one: buffers of ``--run-pages`` (64: 256 KiB) make
    15,625 records a second in total, 61 a VM. The policy is ``batched`` with ``max_bytes`` of one
    page, so that each batch of conversions becomes a decision at once, and that a discard. Reaction
    time is from a VM's first conversion that nobody has reacted to until the discard arrives; it
    contains the wait for the doorbell (``notify``) and the fakes' own work.
neighbours
    255 VMs under that load, beside a VM that floods with single pages, ``--flood`` records a
    second: in turns one that the daemon serves, and one that it doesn't know, which takes as much
    of the machine. The p99 of all reactions beside the first over that of all beside the second, in
    ``--rounds`` pairs of turns of ``--turn-seconds``; ``_interval``: 90 % of what other such pairs
    would have given, by resampling them. ``rested_neighbour``: the same where the 255 convert a run
    a second each.

CPU is the process' own time from /proc, so that other load on the machine hardly changes it;
reaction times do change with it: ``load_waited_percent`` of the time the daemon was kept from
running, and the load average stands beside them.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.fakes import Fakes, Load, fakes
from qmp_upm.units import NSEC

TICKS = os.sysconf("SC_CLK_TCK")
CONFIG = """
[telemetry]
directory = "{folder}/telemetry"
[metrics]
listen = ""
[control]
socket = "{folder}/control.sock"
[defaults]
notify = "{notify_ms} ms"
budget = "1 GiB"
policy = {{ {policy} }}
"""
PROMPT = 'name = "batched", max_bytes = "4 KiB", max_delay = "10 s"'
SETTLE_SECONDS = 5.0
RESAMPLES = 200


class Daemon:
    """The daemon under test, and what the kernel says of it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._proc = Path(f"/proc/{process.pid}")

    def cpu_seconds(self) -> float:
        """Of user and system together, since its start."""
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def waited_seconds(self) -> float:
        """That it could have run since its start, had there been a processor for it."""
        return int((self._proc / "schedstat").read_text().split()[1]) / NSEC

    def resident_mib(self) -> float:
        """Of its memory."""
        pages = int((self._proc / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)

    def open_files(self) -> int:
        """How many."""
        return len(list((self._proc / "fd").iterdir()))

    def threads(self) -> int:
        """How many."""
        return len(list((self._proc / "task").iterdir()))


@contextlib.asynccontextmanager
async def daemon(
    folder: Path,
    vms: int,
    policy: str,
    notify_ms: int,
    *,
    more: int = 0,
    counts: Path | None = None,
) -> AsyncIterator[Daemon]:
    """``qmp-upm run`` with these VMs, all attached, and ``more`` that need not be there yet.

    With ``counts`` it writes into that file what `benchmarks.counted` tells.
    """
    config = CONFIG.format(folder=folder, policy=policy, notify_ms=notify_ms)
    for i in range(vms + more):
        config += f'[vms.vm-{i:03}]\nsocket = "{folder}/vm-{i:03}.monitor"\n'
    (folder / "config.toml").write_text(config)
    program = [str(Path(sys.executable).with_name("qmp-upm"))]
    if counts is not None:
        program = [sys.executable, "-m", "benchmarks.counted", str(counts)]
    process = await asyncio.create_subprocess_exec(
        *(*program, "run", "--config", str(folder / "config.toml")),
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    assert process.stderr is not None  # noqa: S101 - a pipe
    attached = 0
    while attached < vms:
        line = await process.stderr.readline()
        if not line:
            raise SystemExit("the daemon ended before all VMs were attached")
        attached += b'"event": "attached"' in line
    rest = asyncio.create_task(process.stderr.read())
    try:
        yield Daemon(process)
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
        for line in (await rest).splitlines()[:20]:
            if b'"level": "info"' not in line:
                print(line.decode(), file=sys.stderr)


def percentile(values: list[int], percent: float) -> float:
    """Milliseconds, of sorted nanoseconds."""
    at = min(len(values) - 1, int(len(values) * percent / 100))
    return values[at] / (NSEC / 1000) if values else float("nan")


async def measure_idle(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """256 VMs that do nothing, under the default policy."""
    async with (
        fakes(folder, 0, options.vms),
        daemon(folder, options.vms, 'name = "lazy"', options.notify_ms) as under,
    ):
        await asyncio.sleep(SETTLE_SECONDS)
        before = under.cpu_seconds()
        await asyncio.sleep(options.seconds)
        used = under.cpu_seconds() - before
        return {
            "idle_cpu_percent": round(100 * used / options.seconds, 2),
            "idle_rss_mib": round(under.resident_mib(), 1),
        }


async def measure_load(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A million conversions a second over all VMs."""
    load = Load(options.seconds, options.conversions / options.vms, options.run_pages)
    async with (
        fakes(folder, 0, options.vms) as guests,
        daemon(folder, options.vms, PROMPT, options.notify_ms) as under,
    ):
        await guests.load(Load(2.0, load.conversions_per_second, load.run_pages))
        before, waited = under.cpu_seconds(), under.waited_seconds()
        report = await guests.load(load)
        used = under.cpu_seconds() - before
        waited = under.waited_seconds() - waited
        reactions = report["reactions_ns"]
        return {
            "cpu_seconds_per_million": round(used / report["conversions"] * 1e6, 3),
            "cpu_seconds_per_million_records": round(used / report["records"] * 1e6, 1),
            "load_cpu_percent": round(100 * used / report["seconds"], 1),
            "load_waited_percent": round(100 * waited / report["seconds"], 1),
            "conversions_per_second": round(report["conversions"] / report["seconds"]),
            "records_per_second": round(report["records"] / report["seconds"]),
            "decisions_per_second": round(len(reactions) / report["seconds"]),
            "reaction_p50_ms": round(percentile(reactions, 50), 1),
            "reaction_p99_ms": round(percentile(reactions, 99), 1),
            "dropped_records": report["dropped"],
            "lease_expiries": report["lease_expiries"],
            "fakes_cpu_percent": report["fakes_cpu_percent"],
            "load_rss_mib": round(under.resident_mib(), 1),
        }


async def measure_neighbours(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Beside the load of a million conversions, and beside hardly any."""
    results = {}
    for name, rate in (
        ("neighbour", options.conversions / options.vms),
        ("rested_neighbour", float(options.run_pages)),
    ):
        quiet = Load(options.turn_seconds, rate, options.run_pages)
        found = await measure_flood(folder, options, quiet)
        results |= {f"{name}_{key}": value for key, value in found.items()}
    return results


async def measure_flood(folder: Path, options: argparse.Namespace, quiet: Load) -> dict[str, Any]:
    """Turns of this load beside a flood that is the daemon's business and one that is not."""
    flood = Load(quiet.seconds, float(options.flood), 1)
    still = Load(quiet.seconds, 0.0, 1)
    pairs: list[dict[bool, list[int]]] = []
    floods = []

    async def one(guests: Fakes, served: Fakes, unknown: Fakes, *, flooded: bool) -> list[int]:
        report, beside, _ = await asyncio.gather(
            guests.load(quiet),
            served.load(flood if flooded else still),
            unknown.load(still if flooded else flood),
        )
        if flooded:
            floods.append(beside["records"] / beside["seconds"])
        reactions: list[int] = report["reactions_ns"]
        return reactions

    async with (
        fakes(folder, 0, options.vms - 1) as guests,
        fakes(folder, options.vms - 1, 1) as served,
        fakes(folder, options.vms, 1) as unknown,
        daemon(folder, options.vms, PROMPT, options.notify_ms) as under,
    ):
        await one(guests, served, unknown, flooded=True)
        before, begun = under.cpu_seconds(), time.monotonic()
        for turn in range(options.rounds):
            order = (False, True) if turn % 2 else (True, False)
            pairs.append({f: await one(guests, served, unknown, flooded=f) for f in order})
        used = (under.cpu_seconds() - before) / (time.monotonic() - begun)
    chance = random.Random(1)  # noqa: S311 - of a bootstrap
    beside_unknown = pooled(pairs, flooded=False)
    again = sorted(p99_ratio(chance.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return {
        "p99_ratio": round(p99_ratio(pairs), 3),
        "p99_ratio_interval": [round(again[int(RESAMPLES * part)], 3) for part in (0.05, 0.95)],
        "p50_ms": round(percentile(beside_unknown, 50), 1),
        "p99_ms": round(percentile(beside_unknown, 99), 1),
        "cpu_percent": round(100 * used, 1),
        "flood_records_per_second": round(statistics.median(floods)),
    }


def pooled(pairs: list[dict[bool, list[int]]], *, flooded: bool) -> list[int]:
    """All reactions of one kind of turn, sorted."""
    return sorted(itertools.chain.from_iterable(pair[flooded] for pair in pairs))


def p99_ratio(pairs: list[dict[bool, list[int]]]) -> float:
    """With the flood over without."""
    p99s = [percentile(pooled(pairs, flooded=flooded), 99) for flooded in (True, False)]
    return p99s[0] / p99s[1]


PHASES = {"idle": measure_idle, "load": measure_load, "neighbours": measure_neighbours}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What the daemon costs with many VMs.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--vms", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=30, help="pairs with and without the flood")
    parser.add_argument("--turn-seconds", type=float, default=3.0, help="of one of such a pair")
    parser.add_argument("--conversions", type=int, default=1_000_000, help="a second, of all VMs")
    parser.add_argument("--run-pages", type=int, default=64, help="neighbours that become a record")
    parser.add_argument("--flood", type=int, default=20_000, help="records a second of one VM")
    parser.add_argument("--notify-ms", type=int, default=20, help="the daemon's default is 20")
    parser.add_argument("--phase", choices=PHASES, action="append", help="only this one")
    options = parser.parse_args()
    results: dict[str, Any] = {"vms": options.vms, "run_pages": options.run_pages}
    for phase in options.phase or PHASES:
        with TemporaryDirectory() as folder:
            results |= asyncio.run(PHASES[phase](Path(folder), options))
        results[f"{phase}_load_average"] = round(os.getloadavg()[0], 2)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for name, value in results.items():
            print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
