# SPDX-License-Identifier: GPL-2.0-or-later
"""What to run, as it is given to the machine that runs it."""

from dataclasses import asdict, dataclass, field
from typing import Any

POLICIES = ("eager", "lazy", "batched", "none")
WORKLOADS = (
    *("flip", "ovmf", "swiotlb", "boot", "random"),
    *("race", "matrix", "accept", "selftest"),
)
FLIPS = {
    "flip": 2000,
    "ovmf": 5100,
    "swiotlb": 5000,
    "boot": 5100,
    "random": 20000,
    "race": 4000,
    "matrix": 10,
    "accept": 200,
    "paced": 24,
    "selftest": 1,
}
"""``paced`` is not offered by name: it waits for a daemon that keeps up with it."""
LEASE_SECONDS = 2.0
"""Of a daemon that is killed."""
PATIENT_LEASE_SECONDS = 30.0
"""Of all others: a lease that runs out on a busy machine would be a decision that is not theirs."""


@dataclass(frozen=True)
class Scenario:
    """One guest under one policy. ``flips`` 0: the workload's own number.

    ``backing`` "one": the guest does its work on memory that it never converts. ``counted``: in the
    lab, time is instructions executed by one processor, and idle time costs none; see machine.py.
    ``record``: a trace. ``totals``: and what the daemon says of it. The guest
    "paced" rests until the daemon has dealt with what it did. ``patience_seconds``: how long it may
    take.
    """

    policy: str = "eager"
    workload: str = "ovmf"
    vcpus: int = 1
    flips: int = 0
    budget: str = ""
    kill_daemon_after: float | None = None
    plugin: bool = True
    qemu_root: str = ""
    record: bool = False
    totals: bool = False
    backing: str = "two"
    counted: bool = False
    patience_seconds: int = 600
    name: str = field(default="run")

    @property
    def boots_private(self) -> bool:
        """Whether the guest's own part of memory is private from the start, and preallocated."""
        return self.workload == "accept"

    def to_json(self) -> dict[str, Any]:
        """For the runner's list."""
        return asdict(self)

    @property
    def budget_text(self) -> str:
        """What the daemon is given: without a limit of its own, `none` must not meet one."""
        return self.budget or ("1 GiB" if self.policy == "none" else "64 MiB")

    def config(self, socket: str, directory: str) -> str:
        """The daemon's configuration."""
        policy = {
            "eager": 'name = "eager"',
            "none": 'name = "eager", copies = "none"',
            "lazy": 'name = "lazy", max_age = "2 s", pressure = 100',
            "batched": 'name = "batched", max_bytes = "4 MiB", max_delay = "200 ms"',
            "lazy-bytes": 'name = "lazy", max_age = "1 h", pressure = 100',
            "batched-bytes": 'name = "batched", max_bytes = "512 KiB", max_delay = "1 h"',
        }[self.policy]
        lease = PATIENT_LEASE_SECONDS if self.kill_daemon_after is None else LEASE_SECONDS
        return (
            f'[telemetry]\ndirectory = "{directory}"\n[control]\nsocket = "{socket}.control"\n'
            f'[metrics]\nlisten = "127.0.0.1:0"\n'
            f'[vms.{self.name}]\nsocket = "{socket}"\nbudget = "{self.budget_text}"\n'
            f'lease = "{lease} s"\nnotify = "20 ms"\npolicy = {{ {policy} }}\n'
        )
