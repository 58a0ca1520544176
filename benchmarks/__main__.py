# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m benchmarks`: the table of the mail, measured; RESULTS.md and results.json.

With ``--from`` it writes them again from the raw measurements of an earlier run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import confidential, turns
from benchmarks.firmware import boot_firmware
from benchmarks.guest import guest_rounds
from benchmarks.prices import price_points
from benchmarks.reduce import guest_rows, native_rows
from benchmarks.report import report
from benchmarks.results import Firmware, Machine, Results, targets
from tests.lab.build import LabError, say
from tests.lab.machine import kvm_used
from tests.lab.table import IDLE_SECONDS

ROOT = Path(__file__).parents[1]
PARTS = ("prices", "native", "guest", "firmware")
ROUNDS = 5
KIB_32 = 32 << 10


def _line(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _machine(kvm: str) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    processor = next((x.split(":")[1].strip() for x in cpu.splitlines() if "model name" in x), "?")
    changed = _line(["git", "status", "--porcelain", "--untracked-files=no"]) != "unknown"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor,
        "processors": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "qemu": _line(["qemu-system-x86_64", "--version"]).removeprefix("QEMU emulator version "),
        "plugin": _line([str(Path(sys.executable).with_name("qmp-upm")), "--version"]),
        "commit": _line(["git", "rev-parse", "--short", "HEAD"]) + (" and changes" * changed),
        "guest_kvm": kvm,
        "load": round(os.getloadavg()[0], 2),
    }


def _prices() -> list[dict[str, Any]]:
    say("The simulator ...")
    return [point.model_dump() for point in price_points()]


def _native(rounds: int) -> list[dict[str, Any]]:
    found = []
    for number in range(rounds):
        say(f"Native, round {number + 1} of {rounds} ...")
        found.append(turns.native_round(number))
    return found


def _guest(rounds: int, out: Path, cgs: confidential.Options | None) -> list[dict[str, Any]]:
    say(f"Guest, {rounds} rounds: about two minutes each in the lab ...")
    return confidential.guest_rounds(rounds, out, cgs) if cgs else guest_rounds(rounds, out)


def _boots(out: Path) -> list[dict[str, Any]]:
    say("OVMF and a cloud kernel: some minutes in the lab ...")
    return [boot_firmware(out)]


def measure(
    parts: list[str], rounds: int, out: Path, cgs: confidential.Options | None
) -> tuple[dict[str, Any], list[str]]:
    """The raw measurements, kept in ``out`` after each part; and what went wrong in which part."""
    begun = time.monotonic()
    raw: dict[str, Any] = dict.fromkeys(PARTS, ())
    raw["machine"] = _machine(kvm_used() if cgs is None else f"this host's KVM, {cgs.kind}")
    troubles = []
    ways = {
        "prices": _prices,
        "native": lambda: _native(rounds),
        "guest": lambda: _guest(rounds, out / "guest", cgs),
        "firmware": lambda: _boots(out / "firmware"),
    }
    for part in parts:
        try:
            raw[part] = ways[part]()
        except LabError as error:
            troubles.append(f"{part}: {error}")
        raw["machine"]["seconds"] = round(time.monotonic() - begun)
        (out / "raw.json").write_text(json.dumps(raw), encoding="utf-8")
    return raw, troubles


def _firmware(raw: dict[str, Any]) -> Firmware:
    sizes = sorted(raw["firmware_reads"])
    return Firmware(
        where=raw["where"],
        firmware=raw["firmware"],
        kernel=raw["linux"].split("(")[0].split("]")[-1].strip() or "not reached",
        reached=raw["reached"],
        seconds=raw["seconds"],
        conversions=max(raw["conversions"], raw["traced_conversions"]),
        transactions_firmware=len(sizes),
        transactions_kernel=len(raw["kernel_reads"]),
        transaction_bytes=sizes,
        below_32k=sum(size < KIB_32 for size in sizes),
        network=raw["network"],
    )


def reduce(raw: dict[str, Any]) -> Results:
    """The results of these measurements."""
    guest = guest_rows(raw["guest"]) if raw["guest"] else []
    native = native_rows(raw["native"]) if raw["native"] else []
    return Results(
        machine=Machine(**raw["machine"]),
        guest=guest,
        native=native,
        firmware=[_firmware(boot) for boot in raw["firmware"]],
        prices=raw["prices"],
        targets=targets(guest, native),
    )


def write(raw: dict[str, Any], folder: Path) -> Results:
    """results.json, RESULTS.md and the plots."""
    from benchmarks.plots import all_plots  # noqa: PLC0415 - matplotlib

    results = reduce(raw)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")
    windows = {
        "guest_seconds": f"{IDLE_SECONDS:.0f}",
        "native_seconds": f"{turns.IDLE_SECONDS:.0f}",
        "turn_ms": turns.TURN_MS,
        "repeats": turns.REPEATS,
    }
    plots = all_plots(results, raw["guest"], folder / "plots")
    (folder / "RESULTS.md").write_text(report(results, plots, windows), encoding="utf-8")
    return results


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument("--to", type=Path, default=ROOT / "benchmarks", help="where results go")
    made.add_argument("--raw", type=Path, default=ROOT / "bench-results", help="raw measurements")
    made.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a raw.json")
    confidential.add_options(made)
    return made


def main() -> int:
    """Exit code 0; 1 with a hint on stderr if a part could not be measured."""
    args = parser().parse_args()
    troubles: list[str] = []
    if args.source:
        raw = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        try:
            cgs = confidential.options(args)
        except LabError as error:
            print(f"benchmark: {error}", file=sys.stderr)
            return 1
        args.raw.mkdir(parents=True, exist_ok=True)
        raw, troubles = measure(args.parts, args.rounds, args.raw, cgs)
    results = write(raw, args.to)
    for target in results.targets:
        word = {True: "met", False: "MISSED", None: "not measured"}[target.met]
        print(f"{target.what}: {target.measured} (at most {target.limit}): {word}")
    print(f"Written: {args.to / 'RESULTS.md'}, {args.to / 'results.json'}")
    for trouble in troubles:
        print(f"benchmark: {trouble}", file=sys.stderr)
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
