# SPDX-License-Identifier: GPL-2.0-or-later
"""The two sides of a monitor as processes that can be killed, stopped and started again."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from qemu.qmp import QMPError

from qmp_upm.picture import digest_of
from qmp_upm.protocol import STALE_MOST, Copy
from qmp_upm.testing import FakePlugin, FakeQemu, FakeVm
from tests.integration.guest import MEMFD, MIB, WAIT_SECONDS, Guest
from tests.lab.dial import dial


def opened(pid: int) -> tuple[int, int]:
    """Files and threads of a process."""
    proc = Path(f"/proc/{pid}")
    return len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))


class _Vm(ABC):
    """With two monitors in ``folder``: ``qmp`` of the test's own, and the daemon's."""

    monitor = "second"
    pid: int

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.start()

    def start(self) -> None:
        """A new one."""
        for name in ("qmp", self.monitor):
            (self._folder / name).unlink(missing_ok=True)
        self._begin()

    @abstractmethod
    def _begin(self) -> None:
        """Start it, and be able to talk to it."""

    def held(self) -> set[tuple[object, ...]]:
        """What the plugin holds, as `qmp_upm.picture` has it, page by page and region by region."""
        found: set[tuple[object, ...]] = set()
        for region in self.cmd("x-upm-query")["regions"]:
            for copy in Copy:
                ranges, at, done = [], 0, False
                while not done:
                    part = self.cmd(
                        "x-upm-stale", copy=copy, region=region["id"], cursor=at, max=STALE_MOST
                    )
                    ranges += part["ranges"]
                    at, done = part["cursor"], part["done"]
                if ranges:
                    offset, size = np.array(ranges).T
                    digest = digest_of(offset, size)
                    found.add((copy, region["id"], int(size.sum()), len(size), digest))
        return found


class RealVm(_Vm):
    """A stock QEMU with the plugin."""

    def _begin(self) -> None:
        self._guest = Guest(self._folder, *MEMFD, configuration={})
        self.pid = self._guest.process.pid

    def cmd(self, name: str, **arguments: Any) -> Any:
        """By a monitor of the test's own."""
        return self._guest.cmd(name, **arguments)

    def convert(self, megabyte: int, *, private: bool) -> None:
        """A MiB."""
        assert self._guest.convert(megabyte * MIB, MIB, private=private) == 0

    def kill(self) -> None:
        """SIGKILL, and nothing is left."""
        self._guest.close()


class ForkedFakeVm(_Vm):
    """A fake VM in a process of its own."""

    def _begin(self) -> None:
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve_fake, args=(self._folder,), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._client = dial(self._folder / "qmp", self._process.is_alive, WAIT_SECONDS)

    def cmd(self, name: str, **arguments: Any) -> Any:
        """By a monitor of the test's own."""
        return self._client.cmd(name, **arguments)

    def convert(self, megabyte: int, *, private: bool) -> None:
        """A MiB."""
        self.cmd("x-test-convert", megabyte=megabyte, private=private)

    def kill(self) -> None:
        """SIGKILL, and nothing is left."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            self._client.close()
        self._process.kill()
        self._process.join()
        self._process.close()


def _serve_fake(folder: Path) -> None:
    asyncio.set_event_loop(None)
    plugin = FakePlugin({"ram": 256 * MIB})

    def handle(command: str, arguments: Mapping[str, Any]) -> object:
        if command == "x-test-convert":
            at = arguments["megabyte"] * MIB
            return plugin.convert(1, at, MIB, to_private=arguments["private"])
        return plugin(command, arguments)

    async def serve() -> None:
        async with (
            FakeVm(plugin).listening(folder / "second"),
            FakeQemu(handle).listening(folder / "qmp"),
        ):
            await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


class DaemonProcess:
    """The installed daemon with one VM, ``guest``."""

    def __init__(self, folder: Path, monitor: Path, budget: int, lease_ms: int) -> None:
        self._folder = folder
        self._log = (folder / "daemon.log").open("ab")
        (folder / "config.toml").write_text(
            f'[telemetry]\ndirectory = "{folder}"\n[control]\nsocket = "{folder}/control"\n'
            f'[metrics]\nlisten = ""\n[host]\ndiscovery_interval = "50 ms"\n'
            f'[vms.guest]\nsocket = "{monitor}"\nbudget = {budget}\nlease = "{lease_ms} ms"\n'
            f'notify = "1 ms"\npolicy = {{ name = "lazy", max_age = "200 ms" }}\n',
            encoding="utf-8",
        )
        self.start()

    def start(self) -> None:
        """A new daemon."""
        (self._folder / "control").unlink(missing_ok=True)
        program = Path(sys.executable).with_name("qmp-upm")
        self._process = subprocess.Popen(
            [str(program), "run", "--config", str(self._folder / "config.toml")], stderr=self._log
        )
        self.pid = self._process.pid
        self._control = dial(
            self._folder / "control", lambda: self._process.poll() is None, WAIT_SECONDS
        )

    def view(self) -> Any:
        """Of the VM, as query-vm shows it."""
        return self._control.cmd("query-vm", name="guest")

    def held(self) -> set[tuple[object, ...]]:
        """What it believes that the VM holds, by copy and region."""
        return {tuple(part.values()) for part in self._control.cmd("query-held", name="guest")}

    def flush(self) -> None:
        """Have it give back everything: it answers when the plugin has."""
        self._control.cmd("flush", name="guest")

    def end(self, number: signal.Signals) -> int:
        """By this signal; its exit code."""
        with contextlib.suppress(QMPError, OSError, EOFError):
            self._control.close()
        self._process.send_signal(number)
        return self._process.wait(timeout=WAIT_SECONDS)

    def log(self) -> str:
        """All that the daemons have said."""
        return (self._folder / "daemon.log").read_text(encoding="utf-8")

    def close(self) -> None:
        """The end of it."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGCONT)
            self.end(signal.SIGTERM)
        self._log.close()
