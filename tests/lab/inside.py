# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs scenarios one by one, on a KVM that has the VM type: `python -m tests.lab.inside DIR`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmp_upm.telemetry import read_totals
from qmp_upm.units import parse_size
from tests.lab.dial import dial
from tests.lab.scenario import FLIPS, LEASE_SECONDS, Scenario
from tests.lab.told import Told

# At least, and for each conversion of several processors.
GUEST_SECONDS, FLIP_SECONDS = 200.0, 0.02
# Everything is emulated: on a busy machine a Python program takes a minute to start.
START_SECONDS = 240.0
SETTLE_SECONDS = 60.0
POLL_SECONDS = 0.05
# Seen in 11.1.3, not in 10.0.2: KVM_PRE_FAULT_MEMORY after each conversion.
PREFAULTING_QEMU = 11
# Where the guest converts: as in payload.c.
AREA, AREA_BYTES = 32 << 20, 192 << 20
QEMU_ENDS_SECONDS = 5.0
UNKNOWN_WITHOUT_PLUGIN = (
    "vm_kind",
    "discarded_bytes",
    "reused_bytes",
    "peak_stale_bytes",
    "final_stale_bytes",
)
# Index of the class callback that the shim sets, by major release.
KVM_TYPE = {10: "2", 11: "7"}


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Polls; False if it did not come true in time."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def allocated(fd: int, start: int, end: int) -> int:
    """Bytes of a file in [start, end) that are no hole."""
    total, at = 0, start
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        total += max(0, at - data)
    return total


class Run:
    """One scenario: QEMU, daemon and what was seen of them."""

    def __init__(self, scenario: Scenario, job: dict[str, Any], out: Path, work: Path) -> None:
        self.scenario, self.job, self.out, self.work = scenario, job, out, work
        self.guest_output = work / "guest.out"
        self.daemon_log = out / f"{scenario.name}.log"
        self.qemu_log = out / f"{scenario.name}.qemu.log"
        self.telemetry = out / f"{scenario.name}.jsonl"
        self.trace = out / f"{scenario.name}.trace"
        self.told = Told(scenario.name, f"{work}/daemon.sock.control", self.daemon_log)
        self.max_stale = 0
        self.killed = False

    def _enter(self) -> None:
        """In the child: QEMU and its libraries are another system's."""
        if self.scenario.qemu_root:
            os.chroot(self.scenario.qemu_root)
            os.chdir("/")

    def start_qemu(self) -> None:
        """QEMU, stopped, and the runner's monitor."""
        s = self.scenario
        version = subprocess.run(
            ["qemu-system-x86_64", "--version"],
            check=True,
            text=True,
            capture_output=True,
            preexec_fn=self._enter,
        ).stdout.split()[3]
        preload = f"{self.job['shim']}:{self.job['plugin']}" if s.plugin else self.job["shim"]
        arguments = (
            f"workload={s.workload} vcpus={s.vcpus} flips={s.flips or FLIPS[s.workload]} seed=7 "
            f"backing={s.backing}"
        )
        prealloc = "on" if s.boots_private else "off"
        self.qemu = subprocess.Popen(
            [
                "qemu-system-x86_64",
                "-accel",
                "kvm",
                "-machine",
                "q35,smm=off,memory-backend=ram",
                "-object",
                f"memory-backend-memfd,id=ram,size=256M,share=on,prealloc={prealloc}",
                "-m",
                "256",
                "-smp",
                str(s.vcpus),
                "-nodefaults",
                "-display",
                "none",
                "-no-reboot",
                "-device",
                "pvpanic",
                "-action",
                "panic=pause",
                "-S",
                "-bios",
                self.job["firmware"],
                "-kernel",
                self.job["payload"],
                "-append",
                arguments,
                "-debugcon",
                f"file:{self.guest_output}",
                "-monitor",
                "none",
                "-qmp",
                f"unix:{self.work}/daemon.sock,server=on,wait=off",
                "-qmp",
                f"unix:{self.work}/runner.sock,server=on,wait=off",
            ],
            env=dict(
                os.environ,
                LD_PRELOAD=preload,
                LAB_KVM_TYPE=KVM_TYPE[int(version.split(".")[0])],
                **({"LAB_PRIVATE": str(AREA)} if s.boots_private else {}),
            ),
            stderr=self.qemu_log.open("wb"),
            preexec_fn=self._enter,  # noqa: PLW1509
        )
        self.monitor = dial(
            self.work / "runner.sock", lambda: self.qemu.poll() is None, START_SECONDS
        )

    def start_daemon(self) -> None:
        """The daemon, until it has configured the plugin or refused."""
        s = self.scenario
        config = self.work / "config.toml"
        config.write_text(s.config(f"{self.work}/daemon.sock", str(self.out)), encoding="utf-8")
        with self.daemon_log.open("wb") as log:
            self.daemon = subprocess.Popen(
                [str(Path(sys.executable).with_name("qmp-upm")), "run", "--config", str(config)],
                stderr=log,
            )
        if not wait_until(self._daemon_ready, START_SECONDS):
            raise RuntimeError(f"the daemon did not attach: {self.daemon_log.read_text()}")

    def _daemon_ready(self) -> bool:
        if not self.scenario.plugin:
            return '"refused"' in self.daemon_log.read_text(encoding="utf-8")
        return bool(self.query()["lease"]["ms"])

    def start_recording(self) -> None:
        """``qmp-upm record`` beside the daemon, from before the guest's first conversion on."""
        log = self.out / f"{self.scenario.name}.record.log"
        with log.open("wb") as file:
            self.recorder = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("qmp-upm")),
                    *("record", self.scenario.name, "--force", "--output", str(self.trace)),
                    *("--socket", f"{self.work}/daemon.sock.control"),
                ],
                stderr=file,
            )
        if not wait_until(lambda: "recording" in log.read_text("utf-8"), START_SECONDS):
            raise RuntimeError(f"nothing is recorded: {log.read_text('utf-8')}")

    def stop_recording(self) -> None:
        """Everything is in the file when the recorder has ended."""
        self.recorder.send_signal(signal.SIGINT)
        if code := self.recorder.wait(START_SECONDS):
            raise RuntimeError(f"qmp-upm record ended with {code}")

    def query(self) -> dict[str, Any]:
        """The plugin's state; remembers the most stale bytes seen."""
        query: dict[str, Any] = self.monitor.cmd("x-upm-query")
        self.max_stale = max(self.max_stale, query["stale"]["private"] + query["stale"]["shared"])
        return query

    def stale(self) -> int:
        """Stale bytes now."""
        stale = self.query()["stale"]
        return int(stale["private"] + stale["shared"])

    def guest(self) -> dict[str, int]:
        """Lets the guest work until it reports."""
        self.monitor.cmd("cont")
        start = time.monotonic()

        def reported() -> bool:
            kill_at = self.scenario.kill_daemon_after
            due = kill_at is not None and time.monotonic() - start >= kill_at
            if due and not self.killed and self.telemetry.exists():
                self.daemon.kill()
                self.killed = True
            if self.scenario.plugin:
                self.query()
            status = self.monitor.cmd("query-status")["status"]
            if status == "internal-error":
                raise RuntimeError("the guest's processor failed: KVM internal error")
            if status == "guest-panicked":
                self.catch_up()
                self.monitor.cmd("cont")
            return self.guest_output.exists() and "}" in self.guest_output.read_text()

        if not wait_until(reported, GUEST_SECONDS + FLIP_SECONDS * self.scenario.flips):
            raise RuntimeError(f"the guest did not finish: {self.where_it_is()}")
        report: dict[str, int] = json.loads(self.guest_output.read_text())
        if self.scenario.kill_daemon_after is not None and not self.killed:
            raise RuntimeError("the guest finished before the daemon was to be killed")
        return report

    def where_it_is(self) -> str:
        """Twice, a second apart: each processor's registers, and what each thread of QEMU does."""
        seen = [str(self.monitor.cmd("query-status"))]
        if self.scenario.plugin:
            seen.append(f"plugin: {self.query()}")
        for _ in range(2):
            seen.append(
                self.monitor.cmd("human-monitor-command", **{"command-line": "info registers -a"})
            )
            for task in sorted(Path(f"/proc/{self.qemu.pid}/task").iterdir()):
                name = (task / "comm").read_text(encoding="utf-8").strip()
                stat = (task / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
                call = (task / "syscall").read_text(encoding="utf-8").split()[0]
                seen.append(f"{name}: {stat[0]}, system call {call}, ticks {stat[11]}+{stat[12]}")
            time.sleep(1)
        return "\n".join(seen)

    def live_shared(self, guest: dict[str, int]) -> int:
        """What the host should hold: a newer QEMU has KVM map what it has just converted."""
        prefaults = self.monitor.cmd("query-version")["qemu"]["major"] >= PREFAULTING_QEMU
        return guest["mapped_shared_bytes" if prefaults else "live_shared_bytes"]

    def shared_bytes(self) -> int:
        """Allocated bytes of the guest's area in the memfd of its RAM."""
        for link in Path(f"/proc/{self.qemu.pid}/fd").iterdir():
            if "memory-backend-memfd" in str(link.readlink()):
                with link.open("rb") as file:
                    return allocated(file.fileno(), AREA, AREA + AREA_BYTES)
        raise RuntimeError("QEMU has no memfd")

    def catch_up(self) -> None:
        """Until the daemon has dealt with all that the guest has done."""
        if not wait_until(lambda: self.told.is_done(self.query()), SETTLE_SECONDS):
            raise RuntimeError(f"the daemon does not come to an end: {self.query()}")

    def counted(self) -> dict[str, Any]:
        """The plugin's state, once the daemon has the same: what is skipped is counted late."""
        states: list[dict[str, Any]] = []

        def has_counted() -> bool:
            states.append(self.query())
            return self.told.has_counted(states[-1]["counters"])

        if not wait_until(has_counted, SETTLE_SECONDS):
            raise RuntimeError("the daemon never has the plugin's counters")
        return states[-1]

    def settle(self) -> dict[str, Any]:
        """Until the ledger is empty, where it should become so, and telemetry has all."""
        if self.killed:
            time.sleep(LEASE_SECONDS)
        if self.killed or self.scenario.policy in ("lazy", "batched", "eager"):
            wait_until(lambda: not self.stale(), SETTLE_SECONDS)
        if self.scenario.totals:
            self.catch_up()
        final = self.query()
        made = sum(final["counters"][f"conversions-to-{c}"] for c in ("private", "shared"))
        if not self.killed:
            wait_until(
                lambda: (
                    self.telemetry.exists() and read_totals(self.telemetry)["conversions"] >= made
                ),
                SETTLE_SECONDS,
            )
        if self.scenario.totals:
            final = self.counted()
        return final

    def stop_daemon(self) -> tuple[int, float]:
        """Exit code and processor seconds."""
        self.told.close()
        if not self.killed:
            self.daemon.send_signal(signal.SIGTERM)
        _, status, usage = os.wait4(self.daemon.pid, 0)
        self.daemon.returncode = os.waitstatus_to_exitcode(status)
        return self.daemon.returncode, usage.ru_utime + usage.ru_stime

    def result(self) -> dict[str, Any]:
        """Everything, from start to end."""
        s = self.scenario
        self.start_qemu()
        self.start_daemon()
        if s.record:
            self.start_recording()
        version = self.monitor.cmd("query-version")["qemu"]
        guest = self.guest()
        result: dict[str, Any] = {
            "name": s.name,
            "policy": s.policy,
            "workload": s.workload,
            "vcpus": s.vcpus,
            "qemu_version": "{major}.{minor}.{micro}".format(**version),
            "plugin": s.plugin,
            "guest_conversions": guest["conversions"],
            "guest": guest,
            "data_errors": guest["errors"],
            "guest_cycles": guest["cycles"],
            "shared_live_bytes": self.live_shared(guest),
            "budget_bytes": parse_size(s.budget_text),
        }
        if s.plugin:
            result |= self._plugin_result(self.settle())
        if s.totals:
            result["told"] = self.told.everything()
        if s.record:
            self.stop_recording()
            result["trace_file"] = self.trace.name
        result["shared_allocated_bytes"] = self.shared_bytes()
        code, cpu = self.stop_daemon()
        result |= {"daemon_exit": code, "daemon_cpu_seconds": round(cpu, 3)}
        if s.plugin:
            result["after_daemon_stale_bytes"] = self.stale()
        else:
            log = self.daemon_log.read_text(encoding="utf-8").splitlines()
            result |= dict.fromkeys(UNKNOWN_WITHOUT_PLUGIN)
            result["refusal"] = next(json.loads(x)["hint"] for x in log if '"refused"' in x)
        totals = read_totals(self.telemetry)
        return result | {
            "seen_conversions": totals["conversions"],
            "dropped_records": totals["dropped"],
            "telemetry_discarded_bytes": totals["discarded_bytes"],
            "telemetry_file": self.telemetry.name,
        }

    def _plugin_result(self, final: dict[str, Any]) -> dict[str, Any]:
        counters: dict[str, int] = final["counters"]

        def both(name: str) -> int:
            return sum(counters[f"{name}-bytes-{copy}"] for copy in ("private", "shared"))

        return {
            "vm_kind": final["vm-kind"],
            "discarded_bytes": both("inline") + both("requested") + both("failsafe"),
            "requested_bytes": both("requested"),
            "reused_bytes": both("reused"),
            "discards": counters["discards"],
            "peak_stale_bytes": final["stale"]["peak"],
            "final_stale_bytes": final["stale"]["private"] + final["stale"]["shared"],
            "max_polled_stale_bytes": self.max_stale,
            "counters": counters,
        }

    def qemu_state(self) -> str:
        """For the console, when something went wrong."""
        wait_until(lambda: self.qemu.poll() is not None, QEMU_ENDS_SECONDS)
        ended = self.qemu.poll()
        log = self.qemu_log.read_text(errors="replace") if self.qemu_log.exists() else ""
        return f"QEMU {'runs' if ended is None else f'ended with {ended}'}: {log}"

    def close(self) -> None:
        """Leaves nothing running."""
        for name in ("recorder", "daemon", "qemu"):
            process = getattr(self, name, None)
            if process and process.returncode is None:
                process.kill()
                process.wait()


def main() -> None:
    """Every scenario of DIR/job.json; a result that could not be had is absent, and said why."""
    out = Path(sys.argv[1])
    from tests.lab.direct import Direct  # noqa: PLC0415 - these are kinds of Run
    from tests.lab.firmware import Firmware  # noqa: PLC0415
    from tests.lab.launch_real import POLICY, LaunchReal  # noqa: PLC0415
    from tests.lab.launched import KINDS  # noqa: PLC0415
    from tests.lab.table import Table  # noqa: PLC0415
    from tests.lab.torture import Torture  # noqa: PLC0415

    kinds = {"torture": Torture, "table": Table, "firmware": Firmware}
    kinds |= dict.fromkeys(("direct-eager", "direct-defer"), Direct)
    kinds |= dict.fromkeys((f"{POLICY}{kind}" for kind in KINDS), LaunchReal)
    job = json.loads((out / "job.json").read_text(encoding="utf-8"))
    for number, fields in enumerate(job["scenarios"]):
        scenario = Scenario(**fields)
        work = Path(os.environ.get("TMPDIR", "/tmp")) / f"upm-{os.getpid()}-{number}"  # noqa: S108
        work.mkdir(parents=True)
        (out / f"{scenario.name}.jsonl").unlink(missing_ok=True)
        run = kinds.get(scenario.policy, Run)(scenario, job, out, work)
        try:
            result = run.result()
            (out / f"{scenario.name}.json").write_text(json.dumps(result), encoding="utf-8")
            print(f"{scenario.name}: done", flush=True)
        except Exception as error:  # noqa: BLE001 - said on the console; the result is absent
            print(
                f"{scenario.name}: {type(error).__name__}: {error}; {run.qemu_state()}", flush=True
            )
            break
        finally:
            run.close()


if __name__ == "__main__":
    main()
