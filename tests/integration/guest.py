# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU with the plugin, told what to convert by a test-only preload.

Real: QEMU, its memory backends, the guest_memfds, the plugin. The attribute ioctl answers at once.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qmp_upm.plugin import plugin_path
from tests.lab import build
from tests.lab.dial import dial
from tests.lab.inside import KVM_TYPE, START_SECONDS, allocated

MIB = 1 << 20
PAGE = 4096
GUEST_MEMFD = 234  # KVM_CAP_GUEST_MEMFD
WAIT_SECONDS = 60
DEFER = {"private": "defer", "shared": "defer", "budget": 1 << 40}


MEMFD = ("-machine", "q35,smm=off,memory-backend=ram", "-m", "256")
MEMFD += ("-object", "memory-backend-memfd,id=ram,size=256M,share=on")


def has_guest_memfd() -> bool:
    """Whether this host's KVM makes guest_memfds."""
    try:
        import fcntl  # noqa: PLC0415

        with Path("/dev/kvm").open("rb+", buffering=0) as kvm:
            return bool(fcntl.ioctl(kvm, 0xAE03, GUEST_MEMFD))
    except OSError:
        return False


def until(done: Callable[[], object], what: str) -> None:
    """Wait for it."""
    end = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < end, f"not within {WAIT_SECONDS} s: {what}"
        time.sleep(0.01)


class Guest:
    """A QEMU with the plugin, whose guest's memory converts when told."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        backends: int = 1,
        configuration: Mapping[str, object] = DEFER,
        plugin: bool = True,
        before: tuple[str, ...] = (),
        behind: tuple[str, ...] = (),
        launched: bool = True,
    ) -> None:
        """``before`` and ``behind``: more preloads before and after the plugin, from this folder.

        ``launched``: its processor has run, so that what is converted is the guest's doing.
        """
        version = subprocess.run(
            ["qemu-system-x86_64", "--version"], check=True, text=True, capture_output=True
        ).stdout.split()[3]
        objects = [
            build.preload("../integration/convert.c"),
            build.shim(),
            *(build.preload(f"../integration/{name}") for name in before),
            *((plugin_path(),) if plugin else ()),
            *(build.preload(f"../integration/{name}") for name in behind),
            build.preload("../../benchmarks/attributes.c"),
        ]
        self.errors = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [
                "qemu-system-x86_64",
                *("-accel", "kvm", "-nodefaults", "-display", "none", "-S"),
                *("-monitor", "none", "-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
                *("-qmp", f"unix:{folder}/second,server=on,wait=off"),
                *arguments,
            ],
            env=dict(
                os.environ,
                LD_PRELOAD=":".join(map(str, objects)),
                LAB_KVM_TYPE=KVM_TYPE[int(version.split(".")[0])],
                LAB_BACKENDS=str(backends),
            ),
            stderr=self.errors,
        )
        try:
            self.monitor = dial(folder / "qmp", lambda: self.process.poll() is None, START_SECONDS)
        except RuntimeError as error:
            raise AssertionError((folder / "stderr").read_text()) from error
        self._plugin = plugin
        try:
            if launched:
                self.launch()
            if plugin and configuration:
                self.cmd("x-upm-configure", **configuration)
        except BaseException:
            self.close()
            raise

    def launch(self) -> None:
        """Let it run, and stop it again, so that nothing happens but what a test asks for."""
        self.cmd("cont")
        until(lambda: not self._is_launching(), "its first instruction")
        self.cmd("stop")

    def _is_launching(self) -> bool:
        """What the plugin says; the one of release 0.1.0 says nothing."""
        return self._plugin and self.cmd("x-upm-query").get("launching", False)

    def cmd(self, name: str, **arguments: Any) -> Any:
        """A QMP command's reply."""
        return self.monitor.cmd(name, **arguments)

    def convert(self, gpa: int, size: int, *, private: bool) -> int:
        """QEMU's own conversion."""
        return int(self.cmd("x-test-convert", gpa=gpa, size=size, private=private)["result"])

    def stale(self) -> tuple[int, int]:
        """Bytes: private, shared."""
        stale = self.cmd("x-upm-query")["stale"]
        return stale["private"], stale["shared"]

    def drain(self) -> None:
        """Until the ledger is empty."""
        self.cmd("x-upm-configure", private="eager", shared="eager")
        until(lambda: not any(self.stale()), "an empty ledger")
        self.cmd("x-upm-configure", **DEFER)

    def regions(self) -> list[dict[str, Any]]:
        """As the plugin sees them."""
        regions: list[dict[str, Any]] = self.cmd("x-upm-query")["regions"]
        return sorted(regions, key=lambda region: int(region["id"]))

    def shared_file(self, name: str) -> Path:
        """QEMU's descriptor of this file."""
        links = Path(f"/proc/{self.process.pid}/fd").iterdir()
        return next(link for link in links if name in str(link.readlink()))

    def fill(self, name: str, offset: int, size: int) -> None:
        """Writes to the shared copy, as the guest would."""
        with self.shared_file(name).open("rb+", buffering=0) as file:
            file.seek(offset)
            file.write(b"x" * size)

    def held(self, name: str, offset: int, size: int) -> int:
        """Bytes of the shared copy that are allocated."""
        with self.shared_file(name).open("rb") as file:
            return allocated(file.fileno(), offset, offset + size)

    def close(self) -> None:
        """Ends QEMU."""
        with contextlib.suppress(Exception):
            self.monitor.close()
        self.process.kill()
        self.process.wait()
        self.errors.close()
