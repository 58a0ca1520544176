# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m tests.lab run|compare|torture|launch|build`: real conversions, by command."""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from qmp_upm.units import format_size
from tests.lab import build, newest
from tests.lab.build import LabError, say
from tests.lab.launch import is_sound, launch
from tests.lab.launch_real import launch_real
from tests.lab.launched import KINDS
from tests.lab.machine import host_has_vm_type, kvm_used, run_scenarios
from tests.lab.scenario import POLICIES, WORKLOADS, Scenario

ROUNDS = 2


def positive(text: str) -> int:
    """An argument that is a whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="one guest under one policy")
    run.add_argument("--policy", choices=POLICIES, required=True)
    run.add_argument("--vcpus", type=positive, choices=range(1, 5), default=1)
    run.add_argument("--flips", type=positive, default=0, help="how much the guest does")
    run.add_argument("--budget", default="", help='for example "64 KiB"')
    run.add_argument(
        "--kill-daemon-after",
        type=float,
        metavar="S",
        help="SIGKILL, S seconds after the guest starts",
    )
    run.add_argument("--no-plugin", action="store_true")
    run.add_argument("--record", action="store_true", help="a trace for qmp-upm simulate")
    compare = commands.add_parser("compare", help="every policy on one workload, twice")
    torture = commands.add_parser(
        "torture", help="random conversions on several vCPUs, disturbed at random"
    )
    torture.add_argument("--vcpus", type=positive, choices=range(1, 5), default=4)
    torture.add_argument("--flips", type=positive, default=200000)
    launches = commands.add_parser(
        "launch", help="QEMU's own launch code for confidential guests, disturbed while it works"
    )
    launches.add_argument("--kind", choices=KINDS, required=True)
    for command in (run, compare):
        command.add_argument("--workload", choices=WORKLOADS, default="ovmf")
    for command in (run, compare, torture, launches):
        command.add_argument(
            "--qemu-root",
            default="",
            metavar="DIR",
            help="a system whose QEMU to use, unpacked there",
        )
        command.add_argument("--json", action="store_true")
    launches.add_argument(
        "--real-attributes",
        action="store_true",
        help="on a KVM that converts, if need be in the lab: one mode, and some minutes",
    )
    for command in (run, compare, torture, launches):
        command.add_argument(
            "--out", type=Path, default=Path("lab-results"), help="folder for telemetry and logs"
        )
    commands.add_parser(
        "build", help="kernel, guest, test preload and the newest QEMU, into the cache"
    )
    return top


def print_result(result: dict[str, Any]) -> None:
    """For a person."""
    for key, value in result.items():
        if key != "counters":
            sized = key.endswith("_bytes") and value is not None
            print(f"{key:26} {format_size(value) if sized else value}")


def print_comparison(results: list[dict[str, Any]], out: Path) -> None:
    """One row a policy: means of its runs."""
    eager = mean(r["guest_cycles"] for r in results if r["policy"] == "eager")
    table = Table(title=f"{results[0]['workload']}-like guest on {kvm_used()}")
    columns = (
        "policy",
        "conversions",
        "discards",
        "bytes reused",
        "peak stale",
        "final stale",
        "guest time / eager",
        "data errors",
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for policy in POLICIES:
        runs = [r for r in results if r["policy"] == policy]
        row = {
            key: mean(r[key] for r in runs)
            for key in (
                "guest_conversions",
                "discards",
                "reused_bytes",
                "peak_stale_bytes",
                "final_stale_bytes",
                "guest_cycles",
                "data_errors",
            )
        }
        table.add_row(
            policy,
            f"{row['guest_conversions']:.0f}",
            f"{row['discards']:.0f}",
            *(
                format_size(int(row[key]))
                for key in ("reused_bytes", "peak_stale_bytes", "final_stale_bytes")
            ),
            f"{row['guest_cycles'] / eager:.2f}",
            f"{row['data_errors']:.0f}",
        )
    Console(width=110, highlight=False).print(table)
    print(f"Means of {ROUNDS} interleaved runs each. Telemetry:")
    for result in results:
        print(f"  {out / result['telemetry_file']}")


def print_launches(result: dict[str, Any]) -> None:
    """For a person: the runs below what they add up to."""
    for row in result.pop("runs"):
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    print_result(result)


def main() -> int:
    """Exit code 0; 1 with a hint on stderr, or if a torture or a launch shows what must not be."""
    args = parser().parse_args()
    try:
        if args.command == "build":
            for made in (build.shim(), build.firmware(), build.payload(), build.initramfs()):
                say(f"built {made.name}")
            if not host_has_vm_type():
                say(f"built {build.kernel().name}")
            say(f"unpacked {newest.root()}")
        elif args.command == "run":
            scenario = Scenario(
                policy=args.policy,
                workload=args.workload,
                vcpus=args.vcpus,
                flips=args.flips,
                budget=args.budget,
                kill_daemon_after=args.kill_daemon_after,
                plugin=not args.no_plugin,
                qemu_root=args.qemu_root,
                record=args.record,
            )
            result = run_scenarios([scenario], args.out)[0]
            print(json.dumps(result)) if args.json else print_result(result)
        elif args.command == "torture":
            scenario = Scenario(
                policy="torture",
                workload="random",
                vcpus=args.vcpus,
                flips=args.flips,
                qemu_root=args.qemu_root,
                name="torture",
            )
            result = run_scenarios([scenario], args.out)[0]
            print(json.dumps(result)) if args.json else print_result(result)
            return int(result["peak_over_budget_bytes"] > result["conversion_most_bytes"])
        elif args.command == "launch":
            if args.real_attributes:
                result = launch_real([args.kind], args.qemu_root, args.out)[0]
            else:
                result = launch(args.kind, args.qemu_root)
            print(json.dumps(result)) if args.json else print_launches(result)
            return int(not is_sound(result))
        else:
            say(f"Each policy runs {ROUNDS} times on {kvm_used()}.")
            scenarios = [
                Scenario(
                    policy=policy,
                    workload=args.workload,
                    qemu_root=args.qemu_root,
                    name=f"{policy}-{number}",
                )
                for number in range(1, ROUNDS + 1)
                for policy in POLICIES
            ]
            results = run_scenarios(scenarios, args.out)
            print(json.dumps(results)) if args.json else print_comparison(results, args.out)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
