# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs a list of scenarios: on the host's own KVM where it has the VM type, else in the lab."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.lab import build
from tests.lab.build import LabError, say
from tests.lab.inside import FLIP_SECONDS
from tests.lab.scenario import Scenario

ROOT = Path(__file__).parents[2]
CHECK_EXTENSION = 0xAE03
CAP_MEMORY_ATTRIBUTES, CAP_VM_TYPES = 233, 235
SW_PROTECTED_VM = 1
BOOT_SECONDS = 60
COUNTED_KHZ = 1_000_000
"""A counted machine executes an instruction in a nanosecond."""


def host_has_vm_type() -> bool:
    """Whether /dev/kvm makes software-protected VMs whose memory converts."""
    try:
        with Path("/dev/kvm").open("rb+", buffering=0) as kvm:
            types = fcntl.ioctl(kvm, CHECK_EXTENSION, CAP_VM_TYPES)
            return bool(
                types >> SW_PROTECTED_VM & 1
                and fcntl.ioctl(kvm, CHECK_EXTENSION, CAP_MEMORY_ATTRIBUTES)
            )
    except OSError:
        return False


def kvm_used() -> str:
    """For the reader of a result."""
    if host_has_vm_type():
        return "this host's KVM"
    return "the lab: KVM of Linux 6.12, nested in QEMU's emulation of a processor with SVM"


def plugin_file() -> str:
    """The installed plugin; from the source tree the package would look beside itself."""
    program = Path(sys.executable).with_name("qmp-upm")
    return subprocess.run(
        [program, "plugin", "path"], check=True, capture_output=True, text=True
    ).stdout.strip()


def run_scenarios(
    scenarios: list[Scenario], out: Path, more: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The results, in order; results and telemetry files are left in ``out``.

    ``more``: what else the job needs, by name; paths of this machine are the same in the lab.

    Raises LabError if a scenario gave no result.
    """
    out.mkdir(parents=True, exist_ok=True)
    plugin = plugin_file()
    for scenario in scenarios:
        for old in (out / f"{scenario.name}.json", out / f"{scenario.name}.jsonl"):
            old.unlink(missing_ok=True)
    console = _run_all(scenarios, plugin, out, more or {})
    results = []
    for scenario in scenarios:
        file = out / f"{scenario.name}.json"
        if not file.exists():
            tail = "\n".join(console.read_text(errors="replace").splitlines()[-20:])
            raise LabError(f"{scenario.name} gave no result:\n{tail}\nhint: see {console}")
        results.append(
            json.loads(file.read_text(encoding="utf-8")) | {"kvm": kvm_used(), "folder": str(out)}
        )
    return results


def _run_all(scenarios: list[Scenario], plugin: str, out: Path, more: Mapping[str, str]) -> Path:
    """Runs them until one can't; the console's file."""
    objects = {
        "plugin": Path(plugin),
        "shim": build.shim(),
        "firmware": build.firmware(),
        "payload": build.payload(),
    }
    for name, file in objects.items():
        shutil.copy(file, out / name)
    # Beside the job: a QEMU of another root sees nothing else.
    here = out if host_has_vm_type() else Path("/run/lab")
    job = {"scenarios": [s.to_json() for s in scenarios]} | {n: str(here / n) for n in objects}
    job |= more
    (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
    seconds = BOOT_SECONDS + sum(
        s.patience_seconds + int(FLIP_SECONDS * s.flips) for s in scenarios
    )
    if not host_has_vm_type():
        return _run_in_lab(scenarios, out, seconds)
    console = out / "console.log"
    with console.open("wb") as log:
        subprocess.run(
            [sys.executable, "-m", "tests.lab.inside", str(out)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            timeout=seconds,
            check=False,
        )
    return console


def _run_in_lab(scenarios: list[Scenario], out: Path, seconds: int) -> Path:
    kernel, initramfs, console = build.kernel(), build.initramfs(), out / "console.log"
    # The kernel measures the time-stamp counter against the interval timer and gives up on a busy
    # machine; KVM then waits for ever for a frequency before it enters a guest.
    counted = any(s.counted for s in scenarios)
    tsc = f"tsc_early_khz={COUNTED_KHZ if counted else build.tsc_khz()} tsc=reliable"
    roots = {s.qemu_root for s in scenarios if s.qemu_root}
    binds = "".join(
        f"mount --rbind /{d} '{r}/{d}'\n" for r in roots for d in ("dev", "proc", "run")
    )
    (out / "go").write_text(
        f"{binds}cd '{ROOT}' && XDG_CACHE_HOME='{build.cache().parent}' "
        f"PATH='{os.environ['PATH']}' PYTHONDONTWRITEBYTECODE=1 TMPDIR=/run "
        f"'{sys.executable}' -m tests.lab.inside /run/lab\n",
        encoding="utf-8",
    )
    say("Starting the lab's machine.")
    command = [
        "qemu-system-x86_64",
        "-accel",
        # Emulated processors in threads of their own lose guests with several vCPUs, stock QEMU's
        # too: they take a triple fault. One thread is no slower here.
        "tcg,thread=single",
        # Counted: the clock is the number of instructions, whatever else this machine does, and
        # jumps over idle time. With two processors the lab was seen to reset itself that way.
        *(("-icount", "shift=0,sleep=off") if counted else ()),
        "-machine",
        "microvm,acpi=off,rtc=on",
        "-cpu",
        "max,+svm,+npt",
        "-smp",
        "1" if counted else "2",
        "-m",
        "3072",
        "-nodefaults",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        f"file:{console}",
        "-kernel",
        str(kernel),
        "-initrd",
        str(initramfs),
        "-append",
        f"console=ttyS0 panic=-1 reboot=t quiet {tsc}",
        "-fsdev",
        "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device",
        "virtio-9p-device,fsdev=host,mount_tag=host",
        "-fsdev",
        f"local,id=share,path={out.resolve()},security_model=none",
        "-device",
        "virtio-9p-device,fsdev=share,mount_tag=share",
    ]
    with tempfile.TemporaryFile() as errors:
        try:
            code = subprocess.run(command, timeout=seconds, stderr=errors, check=False).returncode
        except subprocess.TimeoutExpired as error:
            raise LabError(
                f"the lab did not end within {seconds} s\nhint: see {console}"
            ) from error
        if code:
            errors.seek(0)
            raise LabError(
                f"QEMU failed: {errors.read().decode(errors='replace')}"
                "\nhint: it takes QEMU 9.1 or newer with TCG and 3 GiB of memory"
            )
    return console
