# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's OVMF and cloud kernel, booted once in the lab."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.lab import build
from tests.lab.build import LabError
from tests.lab.machine import host_has_vm_type, kvm_used, run_scenarios
from tests.lab.scenario import Scenario

MODULES = (
    "net/core/failover",
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
)
INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for m in %s; do
    $b insmod /modules/$m.ko
done
$b sleep 1
echo "lab: disk $($b dd if=/dev/vda bs=64k count=256 2>/dev/null | $b wc -c)"
$b ip addr add 10.0.2.15/24 dev eth0
$b ip link set eth0 up
$b ping -c 1 -W 20 10.0.2.2 >/dev/null && echo "lab: network ok" || echo "lab: network silent"
echo "lab: done"
$b sleep 1000000
"""
STARTUP = "fs0:\r\nvmlinuz.efi initrd=\\initrd.img console=ttyS0 panic=-1\r\n"
LAB_SECONDS = 600


def _packages() -> list[str]:
    """OVMF, and the package that the cloud kernel's depends on."""
    shown = subprocess.run(
        ["apt-cache", "depends", "linux-image-cloud-amd64"],
        check=False,
        capture_output=True,
        text=True,
    ).stdout
    names = [line.split()[-1] for line in shown.splitlines() if "Depends: linux-image-" in line]
    if not names:
        raise LabError(
            "apt knows no linux-image-cloud-amd64\nhint: apt-get update, on Debian for x86-64"
        )
    return ["ovmf", names[0]]


def _unpacked() -> Path:
    """The packages' files, in the cache; nothing is installed."""
    names = _packages()
    target = build.cache() / "-".join(["firmware", *names])
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=build.cache()) as work:
        done = subprocess.run(
            ["apt-get", "download", "-q", *names],
            cwd=work,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise LabError(f"{done.stderr.strip()}\nhint: apt-get update; needs apt's mirror")
        tree = Path(work) / "tree"
        for package in Path(work).glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(tree)], check=True)
        tree.rename(target)
    return target


def _initrd(tree: Path, to: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LabError("busybox is missing\nhint: apt-get install busybox-static")
    kernel = next((tree / "lib/modules").iterdir()) / "kernel"
    modules = [kernel / f"{name}.ko" for name in MODULES]
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        for folder in ("bin", "modules", "dev"):
            (root / folder).mkdir()
        shutil.copy(busybox, root / "bin/busybox")
        for module in modules:
            shutil.copy(module, root / "modules")
        (root / "init").write_text(
            INIT % " ".join(module.stem for module in modules), encoding="utf-8"
        )
        (root / "init").chmod(0o755)
        build.pack(root, to)


def images(out: Path, kernel: Path | None = None) -> dict[str, str]:
    """OVMF, and a folder that QEMU shows as a disk: Linux, and a script for OVMF's shell."""
    tree = _unpacked()
    disk = out / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    shutil.copy(kernel or next((tree / "boot").glob("vmlinuz-*")), disk / "vmlinuz.efi")
    (disk / "startup.nsh").write_text(STARTUP, encoding="ascii", newline="")
    _initrd(tree, disk / "initrd.img")
    return {"ovmf": str(tree / "usr/share/ovmf/OVMF.fd"), "disk": str(disk.resolve())}


def boot_firmware(out: Path) -> dict[str, Any]:
    """In a software-protected VM. Under emulation this takes minutes.

    Not on this machine's KVM with the native benchmark's preload: the machine that these figures
    come from has PVM for KVM, which emulates what is not 64-bit code, and OVMF's start with it.
    """
    scenario = Scenario(
        policy="firmware",
        counted=not host_has_vm_type(),
        patience_seconds=LAB_SECONDS,
        name="firmware-lab",
    )
    names = " ".join(_unpacked().name.split("-", 2)[1:2])
    return run_scenarios([scenario], out, images(out))[0] | {
        "where": kvm_used(),
        "firmware": f"Debian's {names}",
    }
