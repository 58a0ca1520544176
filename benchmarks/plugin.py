# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m benchmarks.plugin [--json]`: what the plugin costs in a stock QEMU, at native speed.

With and without it in one process, in blocks that take turns; see native.py for what is real.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import drains, holds, memory
from benchmarks.native import DEFER, native, preload
from tests.lab.build import LabError, say
from tests.lab.machine import plugin_file

THREADS = (1, 2, 4)
THREADS_MS = 1500
FLIPS, PLAIN = 400, 200_000
BASELINE_SECONDS = 4.0
DRAIN_ROUNDS = 3
DRAIN_THREADS = 4
BACKLOG_MIB = 1024

Figures = dict[str, Any]


def by_word(samples: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """Samples by their word."""
    found: dict[str, list[int]] = {}
    for word, value in samples:
        found.setdefault(word, []).append(value)
    return found


def plain_ioctl() -> Figures:
    """An ioctl that is none of ours: what it takes more than past the plugin, in nanoseconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        env = {
            "LD_PRELOAD": f"{preload()}:{plugin_file()}",
            "BENCH_WORK": "plain",
            "BENCH_OUT": str(output),
        }
        subprocess.run(["/bin/true"], check=True, env=env | {"BENCH_COUNT": str(PLAIN)})
        lines = (line.split() for line in output.read_text(encoding="utf-8").splitlines())
        found = by_word((word, int(value)) for word, value in lines)
    extra = median(p - s for p, s in zip(found["plugin"], found["stock"], strict=True))
    return {
        "plain_ioctl_ns": round(median(found["stock"]) / 1000, 1),
        "plain_ioctl_extra_ns": round(extra / 1000, 1),
    }


def flips() -> Figures:
    """A page there and back, microseconds, without the attribute ioctl."""
    with native("flips", {"private": "eager"}, count=FLIPS) as eager:
        found = by_word(eager.samples())
    with native("flips", DEFER, count=FLIPS) as deferring:
        deferred = by_word(deferring.samples())["plugin"]
    ratio = median(p / s for p, s in zip(found["plugin"], found["stock"], strict=True))
    return {
        "stock_flip_us": round(median(found["stock"]) / 1000, 2),
        "eager_flip_us": round(median(found["plugin"]) / 1000, 2),
        "eager_flip_ratio": round(ratio, 3),
        "deferred_flip_us": round(median(deferred) / 1000, 3),
        "floor_flip_us": round(median(found["floor"]) / 1000, 3),
    }


def conversions_per_second() -> Figures:
    """By threads: past the plugin, through it with nothing deferred, and with all deferred."""
    rows = {}
    for threads in THREADS:
        row = {}
        for name, settings, past in (
            ("stock", {"private": "eager"}, 1),
            ("eager", {"private": "eager"}, 0),
            ("deferred", DEFER, 0),
        ):
            with native(
                "threads", settings, threads=threads, count=THREADS_MS, past_plugin=past
            ) as qemu:
                row[name] = qemu.samples()[0][1]
        rows[str(threads)] = row
    return {"conversions_per_second": rows}


def quantile(values: list[int], share: float) -> int:
    """The value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def drain_once() -> tuple[list[int], list[int], float]:
    """Latencies in nanoseconds of conversions without a drain and beside one; its seconds."""
    with native("latency", DEFER, threads=DRAIN_THREADS, backlog=BACKLOG_MIB) as qemu:
        qemu.wait("ready")
        start = time.monotonic_ns()
        time.sleep(BASELINE_SECONDS)
        drain = time.monotonic_ns()
        qemu.monitor.cmd("x-upm-discard", id=1, copy="shared", all=True)
        while True:
            event = qemu.monitor.pull_event(wait=60.0)
            if event and event["event"] == "X_UPM_DISCARDED":
                break
        end = time.monotonic_ns()
        if event["data"]["discarded"] < BACKLOG_MIB << 20:
            raise LabError(f"the backlog was not there to be drained: {event['data']}")
        qemu.stop_sampling()
        samples = [(int(when), took) for when, took in qemu.samples()]
    idle = [took for when, took in samples if start < when < drain]
    beside = [took for when, took in samples if drain < when < end]
    return idle, beside, (end - drain) / 1e9


def drain() -> Figures:
    """What a drain of the backlog adds to the latency of conversions beside it."""
    idle: list[int] = []
    beside: list[int] = []
    seconds = []
    for _ in range(DRAIN_ROUNDS):
        one_idle, one_beside, took = drain_once()
        idle += one_idle
        beside += one_beside
        seconds.append(took)
    return {
        "drain_seconds": round(median(seconds), 3),
        "drain_samples": len(beside),
        "idle_p999_us": round(quantile(idle, 0.999) / 1000, 1),
        "idle_max_us": round(max(idle) / 1000, 1),
        "drain_extra_p999_us": round((quantile(beside, 0.999) - quantile(idle, 0.999)) / 1000, 1),
        "drain_extra_max_us": round((max(beside) - max(idle)) / 1000, 1),
    }


def show(figures: Figures) -> None:
    """For a person."""
    table = Table(title="The plugin in a stock QEMU, at native speed")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    for name, value in figures.items():
        if name != "conversions_per_second":
            table.add_row(name, f"{value:,}")
    console = Console(width=90, highlight=False)
    console.print(table)
    table = Table("threads", "stock", "eager", "deferred", title="Conversions per second")
    for threads, row in figures["conversions_per_second"].items():
        table.add_row(threads, *(f"{row[name]:,}" for name in ("stock", "eager", "deferred")))
    console.print(table)


def main() -> int:
    """Exit code 0, or 1 with a hint."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plugin", description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures: Figures = {}
    try:
        for part in (plain_ioctl, flips, conversions_per_second, drain, memory, drains, holds):
            say(f"{part.__name__} ...")
            figures |= part()
    except LabError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures)) if args.json else show(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
