# SPDX-License-Identifier: GPL-2.0-or-later
"""Three minutes of mixed load on a real clock: ``python -m benchmarks.soak [--json]``.

64 fake VMs convert in long runs, rest, convert single pages, and convert much; 16 more do so, too,
and are killed and started again after each round. Resident memory, files, threads and what
`benchmarks.counted` tells of the daemon's process are sampled at the end of each round, when all
VMs are attached; the growth is from the most of the first third to the most of the last. Rounds of
the first ``--warm-up`` seconds do not count: the allocators' free memory finds its size in them.
"""

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.daemon import Daemon, daemon
from benchmarks.fakes import Load, fakes

STEADY = 64
RESTARTED = 16
POLICY = 'name = "lazy", max_age = "2 s"'
ROUND = (
    Load(3.0, 2_000, 8),
    Load(3.0, 0, 1),
    Load(3.0, 100, 1),
    Load(3.0, 10_000, 64),
)
SETTLE_SECONDS = 8.0
"""Until those that were started again are attached."""


def sample(under: Daemon, counts: Path) -> dict[str, float]:
    """Of the daemon's process."""
    return {
        "resident_mib": under.resident_mib(),
        "files": under.open_files(),
        "threads": under.threads(),
        **json.loads(counts.read_text()),
    }


async def soak(folder: Path, seconds: float, warm_up: float) -> dict[str, Any]:
    """Rounds until the time is over."""
    samples: list[dict[str, float]] = []
    counts = folder / "counts"
    vms = STEADY + RESTARTED
    async with fakes(folder, 0, STEADY) as steady:
        begin = time.monotonic() + warm_up
        async with daemon(folder, STEADY, POLICY, 20, more=RESTARTED, counts=counts) as under:
            while time.monotonic() < begin + seconds:
                async with fakes(folder, STEADY, RESTARTED) as restarted:
                    await asyncio.sleep(SETTLE_SECONDS)
                    for load in ROUND:
                        await asyncio.gather(steady.load(load), restarted.load(load))
                    if time.monotonic() >= begin:
                        samples.append(sample(under, counts))
            cpu = under.cpu_seconds()
    third = max(1, len(samples) // 3)
    growth = {
        key: max(one[key] for one in samples[-third:]) - max(one[key] for one in samples[:third])
        for key in samples[0]
    }
    return {
        "vms": vms,
        "rounds": len(samples),
        "seconds": seconds,
        "cpu_seconds": round(cpu, 1),
        "samples": samples,
        "growth": {key: round(value, 2) for key, value in growth.items()},
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Soak and print."""
    parser = argparse.ArgumentParser(description="Mixed load on the daemon for a while.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--warm-up", type=float, default=120.0)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        results = asyncio.run(soak(Path(folder), options.seconds, options.warm_up))
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for one in results.pop("samples"):
        print("  ".join(f"{key} {value:7.1f}" for key, value in one.items()))
    for name, value in results.items():
        print(f"{name:16} {value}")


if __name__ == "__main__":
    main()
