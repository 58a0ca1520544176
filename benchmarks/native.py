# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU on this host's KVM whose conversions a preload makes, at native speed.

Real: QEMU's conversion code, the guest_memfd, the memfd, the plugin. Not real: who asks for the
conversions (a thread, not a guest's exit), and KVM_SET_MEMORY_ATTRIBUTES, which returns at once.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.lab import build
from tests.lab.build import LabError
from tests.lab.dial import dial
from tests.lab.inside import KVM_TYPE
from tests.lab.machine import plugin_file

HERE = "../../benchmarks"
WAIT_SECONDS = 120.0
RAM = "4G"
DEFER = {"private": "defer", "shared": "defer", "budget": 1 << 40}


def preload() -> Path:
    """What makes the conversions."""
    return build.preload(f"{HERE}/native.c", f"{HERE}/turns.c", headers=(f"{HERE}/native.h",))


def _in_vain(what: str) -> LabError:
    return LabError(
        f"the native benchmark waited in vain for {what}"
        "\nhint: it takes QEMU 10 or 11, and /dev/kvm with guest_memfd (Linux 6.18)"
    )


def _wait(done: Any, what: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not done():
        if time.monotonic() > end or process.poll() is not None:
            raise _in_vain(what)
        time.sleep(0.01)


def _monitor(path: Path, process: subprocess.Popen[str]) -> QEMUMonitorProtocol:
    try:
        return dial(path, lambda: process.poll() is None, WAIT_SECONDS)
    except RuntimeError as error:
        raise _in_vain("QEMU's monitor") from error


@dataclass
class Native:
    """A running QEMU and what its benchmark has written. ``socket``: a monitor for a daemon."""

    monitor: QEMUMonitorProtocol
    process: subprocess.Popen[str]
    output: Path
    socket: Path

    def wrote(self, word: str) -> bool:
        """Whether the benchmark has come to this line."""
        return self.output.exists() and f"\n{word} " in "\n" + self.output.read_text()

    def wait(self, word: str) -> None:
        """Until it has. LabError if QEMU ends before, or it takes too long."""
        _wait(lambda: self.wrote(word), word, self.process)

    def samples(self) -> list[tuple[str, int]]:
        """Its lines: a word or a time, and a number."""
        self.wait("end")
        lines = (line.split() for line in self.output.read_text().splitlines())
        return [(word, int(value)) for word, value in lines if word not in ("end", "ready")]

    def stop_sampling(self) -> None:
        """Ends a benchmark that runs until it is told."""
        self.output.with_name(self.output.name + ".stop").touch()


@contextmanager
def native(work: str, settings: Mapping[str, Any] | None, **bench: object) -> Iterator[Native]:
    """QEMU with the plugin, configured by ``settings``; without it if they are None."""
    version = subprocess.run(
        ["qemu-system-x86_64", "--version"], check=True, text=True, capture_output=True
    ).stdout.split()[3]
    objects = [preload(), build.shim()]
    objects += [Path(plugin_file())] if settings is not None else []
    objects.append(build.preload(f"{HERE}/attributes.c"))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        os.mkfifo(f"{folder}/turns")
        process = subprocess.Popen(
            [
                "qemu-system-x86_64",
                *("-accel", "kvm", "-machine", "q35,smm=off,memory-backend=ram", "-m", RAM),
                *("-object", f"memory-backend-memfd,id=ram,size={RAM},share=on"),
                *("-nodefaults", "-display", "none", "-no-reboot", "-S", "-monitor", "none"),
                *("-kernel", str(build.payload()), "-append", "workload=flip flips=1"),
                *("-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
                *("-qmp", f"unix:{folder}/daemon,server=on,wait=off"),
            ],
            env=dict(
                os.environ,
                LD_PRELOAD=":".join(map(str, objects)),
                LAB_KVM_TYPE=KVM_TYPE[int(version.split(".")[0])],
                BENCH_WORK=work,
                BENCH_OUT=str(output),
                BENCH_TURNS=f"{folder}/turns",
                **{f"BENCH_{name.upper()}": str(value) for name, value in bench.items()},
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            monitor = _monitor(Path(folder) / "qmp", process)
            if settings:
                monitor.cmd("x-upm-configure", **settings)
            monitor.cmd("cont")
            yield Native(monitor, process, output, Path(folder) / "daemon")
            monitor.close()
        finally:
            process.kill()
            process.communicate()
