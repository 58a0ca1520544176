# SPDX-License-Identifier: GPL-2.0-or-later
"""What results.json holds. Everything in it was computed from one run's raw measurements."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0)]
Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Table):
    """Medians over the rounds; each ratio is taken within a round."""

    row: str
    what: str
    rounds: Annotated[int, Field(gt=0)]
    time_ratio_to_none: Ratio
    """Of the work. Guest: processor time of the virtual processor, or its cycles where the machine
    has more than one processor. Native: processor time of a flip of one page by one thread."""
    spread: Ratio
    """The largest minus the smallest time_ratio_to_none of a round."""
    time_ratio_to_stock: Ratio
    mean_stale_ratio_to_none: Ratio
    """From power-on over the window of the table, idle time included."""
    mean_stale_bytes: Whole
    peak_stale_bytes: Whole
    """As the plugin counts them; 0 by construction where no plugin defers anything."""
    end_stale_bytes: Whole


class GuestRow(Row):
    """Of the lab's guest, or of a real one with ``--cgs``."""

    guest_cycles: Whole
    cycles_ratio_to_none: Ratio
    """With the daemon and QEMU's main loop on the guest's own processor, in the lab."""
    work_seconds: Count
    daemon_seconds: Count
    exits: Whole
    hypercalls: Whole
    faults: Whole
    discards: Whole
    """System calls that the plugin knows of; 0 without it."""
    reused_bytes: Whole
    host_peak_bytes: Whole
    """memfd, guest_memfd and anonymous memory of QEMU."""
    host_mean_bytes: Whole
    host_end_bytes: Whole
    data_errors: int


class Flip(_Table):
    """A round trip of ``pages`` there and back, by each of ``threads``."""

    pages: int
    threads: int
    us: Count
    """Processor time, conversions and the faults that they cause."""
    wall_us: Count
    convert_us: Count
    """QEMU's two conversions alone, by the wall clock."""
    ratio_to_none: Ratio
    wall_ratio_to_none: Ratio
    punches: Count
    faults: Count


class NativeRow(Row):
    """Of QEMU's own conversion code at native speed."""

    wall_ratio_to_none: Ratio
    boot_ms: Count
    """Processor time of the boot's conversions and touches."""
    boot_ratio_to_none: Ratio
    boot_ratio_to_stock: Ratio
    flips: list[Flip]


class Machine(_Table):
    """What it was measured on."""

    date: str
    processor: str
    processors: int
    memory_bytes: int
    kernel: str
    qemu: str
    plugin: str
    commit: str
    guest_kvm: str
    """Which KVM ran the guest's table."""
    load: float
    """Load average of the machine over the minute before the run."""
    seconds: float
    """How long the run took."""


class Firmware(_Table):
    """A real firmware and kernel, booted once."""

    where: str
    firmware: str
    kernel: str
    reached: list[str]
    """What its console said, of what was waited for."""
    seconds: Count
    conversions: int
    transactions_firmware: int
    transactions_kernel: int
    """Requests of the virtio disk that the device served."""
    transaction_bytes: list[int]
    """Of the firmware's, sorted."""
    below_32k: int
    network: bool


class PricePoint(_Table):
    """The simulator's, at one price of a discard."""

    profile: str
    workload: str
    discard_us: Count
    policy: str
    cost_seconds: Count
    ratio_to_optimum: Ratio
    mean_stale_bytes: Whole


class Target(_Table):
    """What issue and README promise."""

    what: str
    limit: float
    measured: float | None
    met: bool | None
    """None: the row is not there."""


class Results(_Table):
    """The whole file."""

    machine: Machine
    guest: list[GuestRow]
    native: list[NativeRow]
    firmware: list[Firmware] = []
    prices: list[PricePoint] = []
    targets: list[Target] = []


def targets(guest: list[GuestRow], native: list[NativeRow]) -> list[Target]:
    """Each promise at both levels."""
    found = []
    for level, rows in (("guest", guest), ("native", native)):
        by_name: dict[str, GuestRow | NativeRow] = {r.row: r for r in rows}
        wanted = [(name, "time_ratio_to_none", 1.02) for name in ("lazy", "batched", "adaptive")]
        wanted += [
            ("adaptive", "mean_stale_ratio_to_none", 0.1),
            ("eager, plugin", "time_ratio_to_stock", 1.02),
        ]
        for name, key, limit in wanted:
            value = getattr(by_name.get(name), key, None)
            found.append(
                Target(
                    what=f"{level}: {key} of {name}",
                    limit=limit,
                    measured=value,
                    met=None if value is None else value <= limit,
                )
            )
    return found
