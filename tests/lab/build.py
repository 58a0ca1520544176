# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds what the lab needs into the user's cache: kernel, initramfs, guest and test preload."""

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = "linux-source-6.12"
TARBALL = Path("/usr/src") / f"{PACKAGE}.tar.xz"
INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /dev /root
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
$b ifconfig lo up
$b mkdir -p /dev/shm
$b mount -t tmpfs tmpfs /dev/shm
$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /root
$b mount -t proc proc /root/proc
$b mount -t sysfs sys /root/sys
$b mount --bind /dev /root/dev
$b mount --bind /dev/shm /root/dev/shm
$b mount -t tmpfs tmpfs /root/run
$b mkdir -p /root/run/lab
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 share /root/run/lab
$b chroot /root /bin/sh /run/lab/go
$b reboot -f
"""


class LabError(Exception):
    """The lab can't run here; the message says why and what to do."""


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def cache() -> Path:
    """Where things are kept from one run to the next."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "qmp-upm"
    path.mkdir(parents=True, exist_ok=True)
    return path


def cached(name: str, parts: list[bytes], make: Callable[[Path], None]) -> Path:
    """The file in the cache for these sources; made in a folder of its own and then moved there."""
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = cache() / f"{name}-{key}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as work:
            made = Path(work) / "made"
            make(made)
            made.replace(target)
    return target


def run(command: list[str], what: str, log: Path | None = None) -> None:
    """Runs it; raises LabError with the end of its output, and leaves all of it in ``log``."""
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        if log:
            log.write_text(result.stdout + result.stderr, encoding="utf-8")
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
        raise LabError(
            f"{what} failed:\n{tail}" + (f"\nhint: all of it is in {log}" if log else "")
        )


def gcc(arguments: list[str], sources: list[str]) -> Callable[[Path], None]:
    """Something for ``cached`` to make; sources are named from this folder."""

    def make(target: Path) -> None:
        run(
            ["gcc", *arguments, "-o", str(target), *(str(HERE / s) for s in sources)],
            f"gcc {' '.join(sources)}",
        )

    return make


def _texts(*names: str) -> list[bytes]:
    return [(HERE / name).read_bytes() for name in names]


def preload(*sources: str, headers: tuple[str, ...] = ()) -> Path:
    """A shared object to preload, from source files that are named from this folder."""
    parts = _texts(*sources, *headers, "../../plugin/kvm-abi.h")
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
    return cached(f"{Path(sources[0]).stem}.so", parts, gcc(flags, list(sources)))


def shim() -> Path:
    """The test-only preload that makes a stock QEMU run a software-protected VM."""
    return preload("shim.c")


def tsc_khz() -> int:
    """The rate of the time-stamp counter, which an emulated machine shares."""
    tool = cached("tsc", _texts("tsc.c"), gcc(["-O2", "-Wall", "-Wextra", "-Werror"], ["tsc.c"]))
    return int(subprocess.run([tool], check=True, capture_output=True, text=True).stdout)


def payload() -> Path:
    """The guest."""
    flags = [
        "-m32",
        "-ffreestanding",
        "-nostdlib",
        "-static",
        "-fno-pic",
        "-no-pie",
        "-O2",
        "-Wall",
        "-fno-stack-protector",
        "-mgeneral-regs-only",
        "-Wextra",
        "-Werror",
        "-Wl,--build-id=none",
        f"-Wl,-T,{HERE / 'payload.ld'}",
        "-Wl,--no-warn-rwx-segments",
    ]
    return cached(
        "payload.elf",
        _texts("payload.c", "hostile.c", "payload.h", "start.S", "payload.ld"),
        gcc(flags, ["start.S", "payload.c", "hostile.c"]),
    )


def firmware() -> Path:
    """What the guest's processors start with."""
    flags = ["-m32", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-e,0"]
    flags += [f"-Wl,-T,{HERE / 'boot.ld'}", "-Wl,--oformat=binary"]
    return cached("boot.rom", _texts("boot.S", "boot.ld"), gcc(flags, ["boot.S"]))


def pack(root: Path, target: Path) -> None:
    """An initramfs of all that is below ``root``."""
    names = "\n".join(str(p.relative_to(root)) for p in root.rglob("*"))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"],
        cwd=root,
        check=True,
        input=names.encode(),
        capture_output=True,
    ).stdout
    target.write_bytes(gzip.compress(archive, 1))


def initramfs() -> Path:
    """Busybox and an init script."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise LabError("busybox is missing\nhint: apt-get install busybox-static")

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            root = Path(work)
            for folder in ("bin", "proc", "dev", "root"):
                (root / folder).mkdir()
            shutil.copy(str(busybox), root / "bin/busybox")
            (root / "init").write_text(INIT, encoding="utf-8")
            (root / "init").chmod(0o755)
            pack(root, target)

    return cached("initramfs", [INIT.encode(), Path(busybox).read_bytes()], make)


def kernel() -> Path:
    """A kernel with software-protected VMs; takes minutes the first time."""
    if not TARBALL.exists():
        raise LabError(
            f"{TARBALL} is missing\nhint: apt-get install {PACKAGE} flex bison "
            "libelf-dev libssl-dev bc cpio xz-utils"
        )
    version = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", PACKAGE], check=True, capture_output=True
    ).stdout
    return cached("bzImage", [version, *_texts("kernel.config")], _make_kernel)


def _make_kernel(target: Path) -> None:
    log = cache() / "kernel-build.log"
    say("Building the lab's kernel: about five minutes, once; later runs find it in the cache.")
    with tempfile.TemporaryDirectory(dir=cache()) as work:
        run(["tar", "-C", work, "-xf", str(TARBALL)], "unpacking the kernel's source", log)
        tree = next(Path(work).iterdir())
        make = ["make", "-C", str(tree), "-s", f"-j{os.cpu_count() or 1}"]
        run([*make, "tinyconfig"], "make tinyconfig", log)
        with (tree / ".config").open("ab") as config:
            config.write(b"\n" + (HERE / "kernel.config").read_bytes())
        run([*make, "olddefconfig"], "make olddefconfig", log)
        start = time.monotonic()
        with log.open("wb") as output:
            build = subprocess.Popen([*make, "bzImage"], stdout=output, stderr=output)
            while True:
                try:
                    code = build.wait(timeout=30)
                    break
                except subprocess.TimeoutExpired:
                    done = sum(1 for _ in tree.rglob("*.o"))
                    say(f"  {time.monotonic() - start:4.0f} s, {done} objects")
        if code:
            raise LabError(f"the kernel does not build\nhint: see {log}")
        shutil.copy(tree / "arch/x86/boot/bzImage", target)
