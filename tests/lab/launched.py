# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock QEMU that launches a confidential guest: started, reset, converted and looked at."""

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qemu.qmp.qmp_client import ExecInterruptedError

from tests.lab import build, image
from tests.lab.build import LabError
from tests.lab.dial import Aside, dial
from tests.lab.inside import wait_until

MIB = 1 << 20
RAM_BYTES = 256 * MIB
STEP_US = 6000
"""A launch has a dozen steps of that length."""
DAEMON = "daemon"
"""Name of the monitor that is left to a daemon."""
KINDS = ("sev-snp", "tdx")


@dataclass(frozen=True)
class Setup:
    """What guests of one comparison have in common; ``program`` is QEMU's command.

    ``real_attributes``: KVM converts, and makes software-protected VMs. ``patience_seconds``:
    longer than anything takes there unless it waits for ever.
    """

    kind: str
    program: tuple[str, ...]
    real_attributes: bool = False
    patience_seconds: float = 20.0


class HangError(LabError):
    """Somebody waits for ever, most likely; ``threads`` says how many."""

    def __init__(self, what: str, seconds: float, threads: int) -> None:
        super().__init__(f"{what} is not done after {seconds:.0f} s")
        self.threads = threads


Pages = frozenset[int]
"""Page numbers in the RAM's shared file, which are those of guest memory."""


def preloads() -> tuple[Path, Path]:
    """What stands before the plugin, and what stands behind it."""
    return build.preload("vcpus.c"), build.preload("launch.c")


def object_arguments(kind: str, folder: Path) -> list[str]:
    """QEMU's object for the kind, and what only SNP has: hashes of a kernel."""
    if kind == "tdx":
        return ["-object", "tdx-guest,id=guest"]
    (folder / "sev").touch()
    device = f"sev-device={folder}/sev,cbitpos={host_cbit()},reduced-phys-bits=1"
    return [
        *("-object", f"sev-snp-guest,id=guest,kernel-hashes=on,{device}"),
        *("-kernel", str(folder / "kernel")),
    ]


def host_cbit() -> int:
    """The position of SEV's encryption bit, 0 where the processor has none; QEMU compares it."""
    tool = build.cached(
        "cbit", [(build.HERE / "cbit.c").read_bytes()], build.gcc(["-O2", "-Wall"], ["cbit.c"])
    )
    return int(subprocess.run([tool], check=True, capture_output=True, text=True).stdout)


class Launched:
    """One QEMU, stopped before its first instruction. ``plugin`` None: as it comes.

    Raises LabError if it does not start.
    """

    def __init__(self, setup: Setup, folder: Path, plugin: Path | None) -> None:
        folder.mkdir(parents=True)
        self.setup = setup
        image.write_firmware(folder / "firmware")
        image.write_kernel(folder / "kernel")
        self.folder, self.log, self.hold = folder, folder / "launches", folder / "hold"
        vcpus, behind = preloads()
        with (folder / "stderr").open("wb") as errors:
            self.process = subprocess.Popen(
                [
                    *setup.program,
                    *("-accel", "kvm", "-cpu", "host", "-nodefaults", "-display", "none", "-S"),
                    *("-machine", "q35,smm=off,memory-backend=ram"),
                    *("-machine", "confidential-guest-support=guest", "-m", "256"),
                    *("-object", "memory-backend-memfd,id=ram,size=256M,share=on"),
                    *object_arguments(setup.kind, folder),
                    *("-bios", str(folder / "firmware"), "-monitor", "none"),
                    *self._monitor("main"),
                    *self._monitor("side"),
                    *self._monitor(DAEMON),
                ],
                env=dict(
                    os.environ,
                    LD_PRELOAD=":".join(str(file) for file in (vcpus, plugin, behind) if file),
                    LAUNCH_LOG=str(self.log),
                    LAUNCH_STEP_US=str(STEP_US),
                    LAUNCH_HOLD=str(self.hold),
                    **({"LAUNCH_REAL": "1"} if setup.real_attributes else {}),
                ),
                stderr=errors,
            )
        # The monitor works on the thread's event loop, and leaves one behind if it has to make it.
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        try:
            self.main = dial(
                folder / "main", lambda: self.process.poll() is None, setup.patience_seconds
            )
        except RuntimeError as error:
            self.close()
            raise LabError(
                f"QEMU failed: {(folder / 'stderr').read_text()}"
                "hint: `python -m tests.lab build` says where a QEMU is that makes either kind"
            ) from error
        self.main.settimeout(setup.patience_seconds)
        self.side = Aside(folder / "side", setup.patience_seconds)

    def _monitor(self, name: str) -> list[str]:
        return ["-qmp", f"unix:{self.folder}/{name},server=on,wait=off"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends QEMU."""
        for monitor in (getattr(self, "main", None), getattr(self, "side", None)):
            with contextlib.suppress(Exception):
                if monitor is not None:
                    monitor.close()
        self._loop.close()
        asyncio.set_event_loop(None)
        self.process.kill()
        self.process.wait()

    def launches(self) -> list[dict[str, Any]]:
        """What the log has: ``begin_ns``, and of those that are done ``end_ns`` and the figures."""
        found: list[dict[str, Any]] = []
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        for line in map(json.loads, text.splitlines()):
            if line["event"] == "begin":
                found.append({"begin_ns": line["mono_ns"]})
            else:
                found[-1] |= line | {"end_ns": line["mono_ns"]}
        return found

    def is_launching(self) -> bool:
        """Whether QEMU is giving pages now."""
        launches = self.launches()
        return bool(launches) and "end_ns" not in launches[-1]

    def launch(self, command: str, number: int) -> dict[str, Any]:
        """Has QEMU launch for the ``number``-th time, or be through with it, and run."""
        try:
            self.main.cmd(command)
        except ExecInterruptedError as error:
            self.process.wait()
            raise self.ended() from error
        self.wait(lambda: len([la for la in self.launches() if "end_ns" in la]) > number, command)
        while not self.main.cmd("query-status")["running"]:
            time.sleep(0.01)
        return self.launches()[number]

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Until it is done; HangError if it never is, LabError if QEMU ends."""
        seconds = self.setup.patience_seconds
        if wait_until(lambda: done() or self.process.poll() is not None, seconds):
            if self.process.poll() is not None:
                raise self.ended()
        else:
            raise HangError(what, seconds, max(1, self.side.cmd("x-test-flipping")["running"]))

    def ended(self) -> LabError:
        """That QEMU has ended, and how."""
        told = (self.folder / "stderr").read_text(encoding="utf-8")
        return LabError(f"QEMU ended with {self.process.returncode}: {told}")

    def start_flipping(self, gpa: int, size: int, to: str, rounds: int = 1) -> None:
        """A thread that converts, see vcpus.c."""
        self.main.cmd("x-test-flip", gpa=gpa, size=size, to=to, rounds=rounds)

    def flip(self, gpa: int, size: int, to: str) -> None:
        """Converts, on a thread that then ends."""
        self.start_flipping(gpa, size, to)
        self.wait(lambda: not self.side.cmd("x-test-flipping")["running"], f"conversion to {to}")

    def use(self, gpa: int, size: int) -> None:
        """Shares RAM and writes all of it."""
        self.flip(gpa, size, "s")
        with self._shared_file().open("rb+", buffering=0) as file:
            file.seek(gpa)
            file.write(b"x" * size)

    def _shared_file(self) -> Path:
        links = Path(f"/proc/{self.process.pid}/fd").iterdir()
        return next(link for link in links if "/memfd:" in str(link.readlink()))

    def allocated(self) -> Pages:
        """What the shared file holds."""
        pages: set[int] = set()
        with self._shared_file().open("rb") as file:
            at = 0
            while at < RAM_BYTES:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
                pages.update(range(at // image.PAGE, end // image.PAGE))
                at = end
        return frozenset(pages)

    def stale(self) -> Pages:
        """What the plugin's ledger has of the RAM's shared copy."""
        query = self.main.cmd("x-upm-query")
        ram = max(query["regions"], key=lambda region: int(region["size"]))["id"]
        ranges: list[tuple[int, int]] = []
        cursor, done = 0, False
        while not done:
            reply = self.main.cmd("x-upm-stale", copy="shared", region=ram, cursor=cursor, max=4096)
            ranges += reply["ranges"]
            cursor, done = reply["cursor"], reply["done"]
        return page_numbers(ranges)


def page_numbers(ranges: Iterable[tuple[int, int]]) -> Pages:
    """Of ranges in bytes: first and how many."""
    return frozenset(
        page
        for first, size in ranges
        for page in range(first // image.PAGE, (first + size) // image.PAGE)
    )
