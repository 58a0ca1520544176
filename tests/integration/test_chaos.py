# SPDX-License-Identifier: GPL-2.0-or-later
"""Kill, stop and restart either side at random points, two hundred times: it converges each time.

``QMP_UPM_CHAOS_SEED`` chooses another course of events.
"""

import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qmp_upm.protocol import Copy
from tests.integration.guest import MIB, has_guest_memfd, until
from tests.integration.sides import DaemonProcess, ForkedFakeVm, RealVm, opened

ROUNDS = 100
"""Of each kind of VM."""
BUDGET = 8 * MIB
LEASE_MS = 300
STOP_SECONDS_MOST = 0.45
SEED = int(os.environ.get("QMP_UPM_CHAOS_SEED", "1"))

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-system-x86_64") and has_guest_memfd()),
    reason="needs QEMU, and /dev/kvm with guest_memfd for any VM (Linux 6.18)",
)


class Chaos:
    """A VM and a daemon, and what has to hold of them."""

    def __init__(self, folder: Path, vm: Any) -> None:
        self.vm = vm
        self.choose = random.Random(SEED)  # noqa: S311 - repeatable, not secret
        self.daemon = DaemonProcess(folder, folder / vm.monitor, BUDGET, LEASE_MS)
        self._plugin: Mapping[str, int] = {}
        self._daemon: Mapping[str, Any] = {}
        self._opened: dict[int, tuple[int, int]] = {}

    def guest_works(self) -> None:
        """Some conversions; the stale copies are within the budget after each."""
        for _ in range(self.choose.randint(1, 6)):
            self.vm.convert(self.choose.randint(32, 48), private=self.choose.random() < 0.5)
            stale = self.vm.cmd("x-upm-query")["stale"]
            assert stale["private"] + stale["shared"] <= BUDGET + MIB

    def attached(self) -> bool:
        """The daemon says so, and the plugin is as it was configured."""
        query = self.vm.cmd("x-upm-query")
        return (
            self.daemon.view()["state"] == "attached"
            and set(query["modes"].values()) == {"defer"}
            and not query["lease"]["expired"]
        )

    def converge(self) -> None:
        """Attached; a flush goes through; all books are in order, and nothing is left over."""
        until(self.attached, f"attached: {self.daemon.view()}, {self.vm.cmd('x-upm-query')}")
        self.vm.convert(40, private=self.choose.random() < 0.5)
        until(self._flushed, "a flush")
        self.vm.convert(self.choose.randint(32, 48), private=self.choose.random() < 0.5)
        until(
            lambda: self.daemon.held() == self.vm.held(), f"{self.daemon.held()}, {self.vm.held()}"
        )
        counters = self.vm.cmd("x-upm-query")["counters"]
        for name, value in self._plugin.items():
            assert counters[name] >= value, name
        self._plugin = counters
        view = self.daemon.view()
        stats = {
            name: view["stats"][name]
            for name in ("reconnects", "resyncs", "lease_expiries", "decisions", "deferred_bytes")
        }
        for name, value in self._daemon.items():
            assert stats[name] >= value, name
        self._daemon = stats
        for pid in self.vm.pid, self.daemon.pid:
            before = self._opened.setdefault(pid, opened(pid))
            until(lambda pid=pid, most=before: opened(pid) <= most, f"{before}, {opened(pid)}")

    def figures_agree(self) -> bool:
        """The daemon's figures of this QEMU are the plugin's."""
        query, view = self.vm.cmd("x-upm-query"), self.daemon.view()
        return all(view["stale_bytes"][copy] == query["stale"][copy] for copy in Copy) and (
            view["stats"]["peak_stale_bytes"] == query["stale"]["peak"]
        )

    def _flushed(self) -> bool:
        try:
            self.daemon.flush()
        except Exception as error:  # the library's, for what the daemon refuses just now
            if "hint" not in str(error):
                raise
            return False
        return True

    def stop(self, pid: int) -> None:
        """Stopped for a while, longer than the lease now and then."""
        os.kill(pid, signal.SIGSTOP)
        if pid == self.daemon.pid:
            self.guest_works()
        time.sleep(self.choose.uniform(0, STOP_SECONDS_MOST))
        os.kill(pid, signal.SIGCONT)

    def restart_daemon(self, number: signal.Signals) -> None:
        """It ends, the guest works on, and another one comes."""
        code = self.daemon.end(number)
        assert code == (0 if number is signal.SIGTERM else -signal.SIGKILL)
        self.guest_works()
        self._daemon = {}
        self.daemon.start()

    def restart_vm(self) -> None:
        """It is killed, and another one has its sockets."""
        self.vm.kill()
        time.sleep(self.choose.uniform(0, 0.1))
        self.vm.start()
        self._plugin = {}

    def strike(self) -> None:
        """One of them, at random."""
        strikes: dict[Callable[[], None], int] = {
            lambda: self.stop(self.vm.pid): 30,
            lambda: self.stop(self.daemon.pid): 30,
            self.restart_vm: 25,
            lambda: self.restart_daemon(signal.SIGKILL): 7,
            lambda: self.restart_daemon(signal.SIGTERM): 5,
            self.restart_both: 3,
        }
        self.choose.choices(list(strikes), list(strikes.values()))[0]()

    def restart_both(self) -> None:
        """Both are killed; the daemon is back before the VM."""
        self.vm.kill()
        self.daemon.end(signal.SIGKILL)
        self._daemon, self._plugin = {}, {}
        self.daemon.start()
        self.vm.start()


@pytest.fixture
def _loop() -> Iterator[None]:
    """The legacy client works on the thread's event loop."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    loop.close()
    asyncio.set_event_loop(None)


@pytest.mark.usefixtures("_loop")
@pytest.mark.parametrize("kind", [pytest.param(RealVm, marks=needs_qemu), ForkedFakeVm])
def test_converges(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    """Attached again, budget kept, counters monotonic, no file or thread left over."""
    vm = kind(tmp_path)
    chaos = Chaos(tmp_path, vm)
    try:
        chaos.converge()
        for _ in range(ROUNDS):
            chaos.guest_works()
            chaos.strike()
            chaos.converge()
        until(chaos.figures_agree, f"{chaos.daemon.view()}, {vm.cmd('x-upm-query')}")
        assert "task-died" not in chaos.daemon.log()
        assert "Traceback" not in chaos.daemon.log()
    finally:
        chaos.daemon.close()
        vm.kill()
