# SPDX-License-Identifier: GPL-2.0-or-later
"""One round of the guest's table: a VM for each row, one after the other, under one daemon."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.inside import Run, wait_until
from tests.lab.rows import BUDGET, Row, daemon_config, in_turn
from tests.lab.scenario import Scenario

IDLE_SECONDS = 30.0
WORK_SAMPLE_SECONDS, IDLE_SAMPLE_SECONDS = 0.05, 1.0
WORK_SECONDS = 240.0
ATTACH_SECONDS = 120.0
EXITS = ("exits", "hypercalls", "pf_taken")


@dataclass(frozen=True)
class Sample:
    """Of a VM; bytes, but for the first three.

    ``vcpu_ns``: processor time of the virtual processor's thread since power-on, in the guest, KVM
    and QEMU; 0 where it can't be had. ``daemon_ns``: of the daemon.
    """

    wall_s: float
    vcpu_ns: int
    daemon_ns: int
    stale_private: int
    stale_shared: int
    memfd: int
    unevictable: int
    anonymous: int


class ThreadClock:
    """Exact processor time of one thread of another process.

    A control group of version 2 tells it in microseconds, in any kernel; a thread can be in one of
    its own below its process's. /proc tells hundredths of a second.
    """

    root = Path("/run/upm-cgroup")

    def __init__(self, pid: int, thread: int) -> None:
        self.group = self.root / f"{pid}"
        if not self.root.is_dir():
            self.root.mkdir()
            subprocess.run(["mount", "-t", "cgroup2", "none", self.root], check=True)
        (self.group / "thread").mkdir(parents=True)
        (self.group / "cgroup.procs").write_text(str(pid), encoding="ascii")
        (self.group / "thread/cgroup.type").write_text("threaded", encoding="ascii")
        (self.group / "thread/cgroup.threads").write_text(str(thread), encoding="ascii")

    def ns(self) -> int:
        """Since the thread began to be watched."""
        text = (self.group / "thread/cpu.stat").read_text(encoding="ascii")
        return int(dict(line.split() for line in text.splitlines())["usage_usec"]) * 1000


def process_ns(pid: int) -> int:
    """Processor time of any process: the clock that clock_getcpuclockid(3) names."""
    return time.clock_gettime_ns(~pid << 3 | 2)


def meminfo(key: str) -> int:
    """Bytes. Pages of a guest_memfd count as Unevictable: its mapping is marked so."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 0


def anonymous(pid: int) -> int:
    """Resident bytes of a process that are in no file."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


class Guest(Run):
    """A row's VM: stopped until its turn."""

    row: Row
    memfd: int
    clock: ThreadClock | None = None

    def begin(self, row: Row) -> None:
        """QEMU, stopped."""
        self.row = row
        self.start_qemu()
        links = Path(f"/proc/{self.qemu.pid}/fd").iterdir()
        found = next(x for x in links if "memory-backend-memfd" in str(x.readlink()))
        self.memfd = os.open(found, os.O_RDONLY)
        if self.scenario.counted:
            self.clock = ThreadClock(
                self.qemu.pid, self.monitor.cmd("query-cpus-fast")[0]["thread-id"]
            )

    def attached(self) -> bool:
        """Whether the daemon serves it."""
        return not self.row.plugin or bool(self.query()["lease"]["ms"])

    def sample(self, daemon: int, unevictable: int) -> Sample:
        """Now. A QEMU without the plugin is asked something else, so that it costs the same."""
        stale = {"private": 0, "shared": 0}
        if self.row.plugin:
            stale = self.query()["stale"]
        else:
            self.monitor.cmd("query-status")
        return Sample(
            time.time(),
            self.clock.ns() if self.clock else 0,
            process_ns(daemon),
            stale["private"],
            stale["shared"],
            os.fstat(self.memfd).st_blocks * 512,
            meminfo("Unevictable") - unevictable,
            anonymous(self.qemu.pid),
        )

    def exits(self) -> dict[str, int]:
        """KVM's own counts, from the VM's first instruction on, its firmware's too."""
        found = self.monitor.cmd("query-stats", target="vcpu")
        totals = dict.fromkeys(EXITS, 0)
        for provider in found:
            for stat in provider["stats"]:
                if stat["name"] in totals:
                    totals[stat["name"]] += stat["value"]
        return totals

    def finished(self) -> bool:
        """Whether its work is done."""
        return self.guest_output.exists() and "}" in self.guest_output.read_text()

    def report(self, begun_s: float, done_s: float) -> dict[str, int]:  # noqa: ARG002 - see RealGuest
        """The guest's own cycles and data errors."""
        found: dict[str, int] = json.loads(self.guest_output.read_text())
        return found

    def measure(self, daemon: int) -> dict[str, Any]:
        """Its boot, its idle time, and what was held meanwhile."""
        unevictable = meminfo("Unevictable")
        samples: list[Sample] = []
        self.monitor.cmd("cont")
        end = time.monotonic() + WORK_SECONDS
        while not self.finished():
            if time.monotonic() > end or self.qemu.poll() is not None:
                raise RuntimeError(f"{self.row.name}: the guest did not finish")
            samples.append(self.sample(daemon, unevictable))
            time.sleep(WORK_SAMPLE_SECONDS)
        done_s = self.guest_output.stat().st_mtime
        exits = self.exits()
        while not samples or samples[-1].wall_s < done_s + IDLE_SECONDS:
            samples.append(self.sample(daemon, unevictable))
            time.sleep(IDLE_SAMPLE_SECONDS)
        result: dict[str, Any] = {
            "row": self.row.name,
            "guest": self.report(samples[0].wall_s, done_s),
            "done_s": done_s,
            "exits": exits,
            "samples": [list(vars(s).values()) for s in samples],
            "sample_fields": list(Sample.__dataclass_fields__),
        }
        if self.row.plugin:
            last = self.query()
            result["peak_stale_bytes"] = last["stale"]["peak"]
            result["counters"] = last["counters"]
        os.close(self.memfd)
        return result


class Table(Run):
    """All rows once."""

    kind: type[Guest] = Guest
    guests: list[Guest]

    def result(self) -> dict[str, Any]:
        """The rows, in the order in which they ran."""
        number = self.scenario.flips
        self.guests = []
        for row in in_turn(number):
            work = self.work / row.slug
            work.mkdir()
            scenario = Scenario(
                workload="boot",
                plugin=row.plugin,
                backing=row.backing,
                counted=self.scenario.counted,
                name=row.slug,
            )
            guest = self.kind(scenario, self.job, self.out, work)
            self.guests.append(guest)
            guest.begin(row)
        self._start_daemon()
        measured = []
        for guest in self.guests:
            measured.append(guest.measure(self.daemon.pid))
            guest.close()
        self.daemon.send_signal(signal.SIGTERM)
        code, cpu = self.stop_daemon()
        if code:
            raise RuntimeError(f"the daemon exited with {code}: see {self.daemon_log}")
        version = subprocess.run(
            ["qemu-system-x86_64", "--version"], check=True, text=True, capture_output=True
        ).stdout.split()[3]
        return {
            "name": self.scenario.name,
            "rows": measured,
            "daemon_cpu_seconds": cpu,
            "processors": os.cpu_count(),
            "kernel": os.uname().release,
            "qemu": version,
            "idle_seconds": IDLE_SECONDS,
            "budget_bytes": BUDGET,
        }

    def _start_daemon(self) -> None:
        config = self.work / "config.toml"
        sockets = {guest.row: f"{guest.work}/daemon.sock" for guest in self.guests}
        config.write_text(daemon_config(sockets, str(self.work)), encoding="utf-8")
        with self.daemon_log.open("wb") as log:
            self.daemon = subprocess.Popen(
                [str(Path(sys.executable).with_name("qmp-upm")), "run", "--config", str(config)],
                stderr=log,
            )
        if not wait_until(lambda: all(g.attached() for g in self.guests), ATTACH_SECONDS):
            raise RuntimeError(f"the daemon did not attach: {self.daemon_log.read_text()}")

    def qemu_state(self) -> str:
        """Of all of them."""
        return "; ".join(guest.qemu_state() for guest in self.guests if hasattr(guest, "qemu"))

    def close(self) -> None:
        """Leaves nothing running."""
        for guest in self.guests:
            guest.close()
        super().close()
