# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's table on a host with SEV-SNP or TDX: a real firmware and kernel that convert.

The rows, the daemon and the figures are the lab's; the guest is Linux, booted from a disk by the
owner's OVMF, up to its user space, then idle. Where such guests can't run it says so at once. The
machines that this was written on have neither; what follows the refusal has not run on one.
"""

import argparse
import fcntl
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.firmware import images
from tests.lab.build import LabError
from tests.lab.firmware import MARKS, Firmware
from tests.lab.machine import CAP_VM_TYPES, CHECK_EXTENSION, plugin_file
from tests.lab.scenario import Scenario
from tests.lab.table import Guest, Table

KVM_TYPES = {"sev-snp-guest": 4, "tdx-guest": 5}
"""KVM's machine types: KVM_X86_SNP_VM and KVM_X86_TDX_VM."""
OBJECTS = {
    "sev-snp-guest": "sev-snp-guest,id=cgs,cbitpos=51,reduced-phys-bits=1",
    "tdx-guest": "tdx-guest,id=cgs",
}
PROCESSORS = {"sev-snp-guest": "EPYC-v4", "tdx-guest": "host"}


@dataclass(frozen=True)
class Options:
    """``kind``: QEMU's object. ``ovmf`` and ``kernel`` are built for such a guest."""

    kind: str
    ovmf: Path
    kernel: Path | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this module."""
    parser.add_argument(
        "--cgs", choices=KVM_TYPES, help="run the guest's table in such VMs of this host"
    )
    parser.add_argument("--ovmf", type=Path, help="OVMF in one file, built for --cgs, with a shell")
    parser.add_argument(
        "--kernel", type=Path, help="Linux for the guest; else Debian's cloud kernel"
    )


def options(args: argparse.Namespace) -> Options | None:
    """None without --cgs; LabError if this host can't run such guests."""
    if args.cgs is None:
        return None
    if not vm_types() >> KVM_TYPES[args.cgs] & 1:
        raise LabError(
            f"this host's KVM makes no VM for {args.cgs}"
            "\nhint: it takes a processor with SEV-SNP or TDX, switched on in the BIOS, and "
            "kvm_amd.sev_snp=1 (Linux 6.11) or kvm_intel.tdx=1 (Linux 6.16); without --cgs the "
            "table is measured in the lab"
        )
    shown = subprocess.run(
        ["qemu-system-x86_64", "-object", "help"], check=True, capture_output=True, text=True
    ).stdout
    if args.cgs not in shown.split():
        raise LabError(f"this QEMU has no {args.cgs}\nhint: SNP takes QEMU 9.1, TDX 10.1 or newer")
    if args.ovmf is None or not args.ovmf.is_file():
        raise LabError(
            "--cgs needs a firmware\nhint: --ovmf FILE, in one file and with a shell, such as "
            "EDK II's OvmfPkgX64 makes"
        )
    return Options(args.cgs, args.ovmf, args.kernel)


def vm_types() -> int:
    """A bit for each machine type of KVM; 0 without KVM."""
    try:
        with Path("/dev/kvm").open("rb+", buffering=0) as kvm:
            return fcntl.ioctl(kvm, CHECK_EXTENSION, CAP_VM_TYPES)
    except OSError:
        return 0


class RealGuest(Firmware, Guest):
    """A row's VM. ``one backing`` is an ordinary VM that boots the same."""

    def machine(self) -> str:
        """With the confidential guest, but for one backing."""
        two = self.scenario.backing == "two"
        split = ",kernel-irqchip=split" if self.job["kind"] == "tdx-guest" else ""
        return super().machine() + split + (",confidential-guest-support=cgs" if two else "")

    def more(self) -> tuple[str, ...]:
        """The object, and the processor that it wants."""
        kind = self.job["kind"]
        made = ("-object", OBJECTS[kind]) if self.scenario.backing == "two" else ()
        return (*made, "-cpu", PROCESSORS[kind])

    def preload(self, version: str) -> dict[str, str]:  # noqa: ARG002 - no shim, on any version
        """The plugin alone, where the row has it."""
        return {"LD_PRELOAD": self.job["plugin"]} if self.scenario.plugin else {}

    def finished(self) -> bool:
        """User space is up."""
        self.guest_output = self.console
        return MARKS["user space"] in self.said()

    def report(self, begun_s: float, done_s: float) -> dict[str, int]:
        """Nanoseconds by the host's clock for cycles; it does not check its data."""
        return {"cycles": round((done_s - begun_s) * 1e9), "errors": 0}


class RealTable(Table):
    """All rows once, on this host."""

    kind = RealGuest


def guest_rounds(rounds: int, out: Path, cgs: Options) -> list[dict[str, Any]]:
    """As those of the lab. LabError if one fails."""
    out.mkdir(parents=True, exist_ok=True)
    job = images(out, cgs.kernel) | {
        "plugin": plugin_file(),
        "kind": cgs.kind,
        "ovmf": str(cgs.ovmf),
    }
    found = []
    for number in range(rounds):
        scenario = Scenario(policy="table", flips=number, name=f"table-{number}")
        with tempfile.TemporaryDirectory() as work:
            run = RealTable(scenario, job, out, Path(work))
            try:
                found.append(run.result())
            except RuntimeError as error:
                raise LabError(f"{error}: {run.qemu_state()}\nhint: see {out}") from error
            finally:
                run.close()
    return found
