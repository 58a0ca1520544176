# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU for each row at native speed, all under one daemon, taking turns of milliseconds."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.native import Native, native
from tests.lab.build import LabError
from tests.lab.rows import Row, daemon_config

ATTACH_SECONDS = 60.0
POLL_SECONDS = 0.005
ANSWER = ("trips", "total_ns", "cpu_ns", "convert_ns", "faults", "punches")


@dataclass(frozen=True)
class Turn:
    """What a row's QEMU is to do.

    ``kind`` flips: round trips of ``pages`` by ``threads``, for ``ms``; boot: the transfers and the
    bounce buffer of the lab's guest, once.
    """

    kind: str
    pages: int = 1
    threads: int = 1
    ms: int = 50


@dataclass
class Vm:
    """A row's QEMU."""

    row: Row
    qemu: Native
    orders: TextIO
    answers: int = field(default=0)

    def query(self) -> dict[str, Any]:
        """The plugin's state."""
        found: dict[str, Any] = self.qemu.monitor.cmd("x-upm-query")
        return found

    def stale(self) -> int:
        """Bytes now; none where there is no plugin to defer."""
        if not self.row.plugin:
            return 0
        stale = self.query()["stale"]
        return int(stale["private"] + stale["shared"])

    def attached(self) -> bool:
        """Whether the daemon serves it."""
        return not self.row.policy or bool(self.query()["lease"]["ms"])

    def take(self, turn: Turn) -> dict[str, int]:
        """One turn: sums over its threads."""
        before = self._discards()
        order = f"{turn.kind} {self.row.backing} {turn.pages} {turn.threads} {turn.ms}\n"
        self.orders.write(order)
        self.orders.flush()
        self.answers += 1
        end = time.monotonic() + ATTACH_SECONDS
        lines: list[str] = []
        while len(lines) < self.answers:
            if time.monotonic() > end or self.qemu.process.poll() is not None:
                raise LabError(
                    f"{self.row.name}: no answer to {order!r}\nhint: is the machine out of memory?"
                )
            time.sleep(POLL_SECONDS)
            lines = self.qemu.output.read_text(encoding="ascii").splitlines(keepends=True)
            lines = [line for line in lines if line.startswith("turn ") and line.endswith("\n")]
        answer = dict(zip(ANSWER, map(int, lines[-1].split()[1:]), strict=True))
        if self.row.plugin:
            answer["punches"] = self._discards() - before
        return answer

    def _discards(self) -> int:
        return int(self.query()["counters"]["discards"]) if self.row.plugin else 0


@contextmanager
def fleet(order: tuple[Row, ...]) -> Iterator[list[Vm]]:
    """All of them, ready, and the daemon attached. LabError if they can't be had."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        vms = []
        for row in order:
            qemu = stack.enter_context(native("turns", {} if row.plugin else None))
            fifo = (qemu.output.with_name("turns")).open("w", encoding="ascii")
            vms.append(Vm(row, qemu, stack.enter_context(fifo)))
        config = folder / "config.toml"
        sockets = {vm.row: str(vm.qemu.socket) for vm in vms}
        config.write_text(daemon_config(sockets, str(folder)), encoding="utf-8")
        log = folder / "log"
        daemon = subprocess.Popen(
            [str(Path(sys.executable).with_name("qmp-upm")), "run", "--config", str(config)],
            stderr=stack.enter_context(log.open("wb")),
        )
        try:
            end = time.monotonic() + ATTACH_SECONDS
            while not all(vm.attached() for vm in vms):
                if time.monotonic() > end or daemon.poll() is not None:
                    raise LabError(
                        f"the daemon did not attach:\n{log.read_text()}"
                        "\nhint: 'make build' installs it"
                    )
                time.sleep(0.1)
            yield vms
        finally:
            daemon.terminate()
            daemon.wait()
