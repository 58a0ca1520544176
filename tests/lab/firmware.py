# SPDX-License-Identifier: GPL-2.0-or-later
"""A real firmware and a real kernel under the plugin: what they ask of devices and host."""

import os
import re
import shutil
import subprocess
import time
from typing import Any

from tests.lab.dial import dial
from tests.lab.inside import KVM_TYPE, START_SECONDS, Run, wait_until

RAM = "512M"
MARKS = {
    "firmware": "UEFI Interactive Shell",
    "kernel": "Linux version",
    "disk": "lab: disk",
    "network": "lab: network",
    "user space": "lab: done",
}
TRACED = ("virtio_blk_handle_read", "virtio_set_status", "kvm_convert_memory")
SECTOR_BYTES = 512
DRIVER_OK = 4


def disk_requests(trace: str) -> tuple[list[int], list[int]]:
    """Bytes of each read of the disk, by the firmware and by the kernel.

    The kernel's are those since the device was last made ready: it begins by resetting it.
    """
    firmware: list[int] = []
    since_reset: list[int] = []
    ready = False
    for line in trace.splitlines():
        status = re.search(r"virtio_set_status vdev \S+ val (\d+)", line)
        read = re.search(r"virtio_blk_handle_read .* nsectors (\d+)", line)
        if read:
            since_reset.append(int(read[1]) * SECTOR_BYTES)
            ready = True
        elif status and int(status[1]) == 0 and ready:
            firmware += since_reset
            since_reset, ready = [], False
    return (firmware, since_reset) if firmware else (since_reset, [])


class Firmware(Run):
    """One boot. The job names ``ovmf``, OVMF in one file, and ``disk``, a folder."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.console = self.work / "console"
        self.trace = self.work / "trace"

    def start_qemu(self) -> None:
        """QEMU, stopped."""
        version = subprocess.run(
            ["qemu-system-x86_64", "--version"], check=True, text=True, capture_output=True
        ).stdout.split()[3]
        self.qemu = subprocess.Popen(
            [
                "qemu-system-x86_64",
                *("-accel", "kvm", "-machine", self.machine(), "-m", RAM),
                *("-object", f"memory-backend-memfd,id=ram,size={RAM},share=on"),
                *("-nodefaults", "-display", "none", "-no-reboot", "-S", "-monitor", "none"),
                *("-bios", self.job["ovmf"]),
                *("-drive", f"id=disk,if=none,format=raw,readonly=on,file=fat:{self.job['disk']}"),
                *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
                *("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="),
                *("-serial", f"file:{self.console}", "-D", str(self.trace)),
                *(part for name in TRACED for part in ("-trace", f"enable={name}")),
                *("-qmp", f"unix:{self.work}/runner.sock,server=on,wait=off"),
                *("-qmp", f"unix:{self.work}/daemon.sock,server=on,wait=off"),
                *self.more(),
            ],
            env=os.environ | self.preload(version),
            stderr=self.qemu_log.open("wb"),
        )
        self.monitor = dial(
            self.work / "runner.sock", lambda: self.qemu.poll() is None, START_SECONDS
        )

    def machine(self) -> str:
        """Of QEMU's machine option."""
        return "q35,smm=off,memory-backend=ram"

    def more(self) -> tuple[str, ...]:
        """Arguments besides."""
        return ()

    def preload(self, version: str) -> dict[str, str]:
        """QEMU's environment: the plugin, and the shim that makes the VM what it is."""
        return {
            "LD_PRELOAD": f"{self.job['shim']}:{self.job['plugin']}",
            "LAB_KVM_TYPE": KVM_TYPE[int(version.split(".", maxsplit=1)[0])],
        }

    def result(self) -> dict[str, Any]:
        """How far it came in its time, and what it asked for."""
        self.start_qemu()
        start = time.monotonic()
        self.monitor.cmd("cont")
        wait_until(
            lambda: MARKS["user space"] in self.said() or self.qemu.poll() is not None,
            self.scenario.patience_seconds,
        )
        seconds = time.monotonic() - start
        query = self.monitor.cmd("x-upm-query")
        trace = self.trace.read_text(errors="replace") if self.trace.exists() else ""
        firmware, kernel = disk_requests(trace)
        said = self.said()
        shutil.copy(self.console, self.out / f"{self.scenario.name}.console")
        return {
            "name": self.scenario.name,
            "vm_kind": query["vm-kind"],
            "seconds": round(seconds, 1),
            "reached": [name for name, text in MARKS.items() if text in said],
            "linux": next((x for x in said.splitlines() if MARKS["kernel"] in x), ""),
            "network": "lab: network ok" in said,
            "conversions": sum(
                query["counters"][f"conversions-to-{copy}"] for copy in ("private", "shared")
            ),
            "traced_conversions": trace.count("kvm_convert_memory"),
            "firmware_reads": firmware,
            "kernel_reads": kernel,
        }

    def said(self) -> str:
        """All that the console has shown."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""
