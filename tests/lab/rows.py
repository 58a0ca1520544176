# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of the benchmarks' tables: what is compared with what."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

BUDGET, NO_LIMIT = 128 << 20, 1 << 40
LEASE_SECONDS = 20
NONE = "none"
STOCK = "eager"


@dataclass(frozen=True)
class Row:
    """``policy``: the daemon's, in TOML; empty where nobody looks after the VM.

    ``limited``: held to the budget that a VM is given; the rows that only switch a discard off are
    not, since AMD's modes of 2022, which they stand for, had none.
    """

    name: str
    what: str
    policy: str = ""
    plugin: bool = True
    backing: str = "two"
    limited: bool = False

    @property
    def slug(self) -> str:
        """The name of its VM and of its files."""
        return self.name.replace(", ", "-").replace(" ", "-")


_ROWS = (
    Row("one backing", "the same work on memory that the guest never converts", "", False, "one"),
    Row(STOCK, "stock QEMU, the plugin not loaded", "", plugin=False),
    Row("eager, plugin", "the plugin loaded, nothing deferred", 'name = "eager"'),
    Row(
        "shared discard off",
        "only private copies are discarded: the mail's third row",
        'name = "eager", copies = "private"',
    ),
    Row(
        "private discard off",
        "only shared copies are discarded",
        'name = "eager", copies = "shared"',
    ),
    Row(NONE, "nothing is discarded, without a budget", 'name = "eager", copies = "none"'),
    Row("lazy", "lazy, as shipped, within its budget", 'name = "lazy"', limited=True),
    Row("batched", "batched, as shipped, within its budget", 'name = "batched"', limited=True),
    Row("adaptive", "adaptive, as shipped, within its budget", 'name = "adaptive"', limited=True),
)
OURS = ("lazy", "batched", "adaptive")


def rows() -> tuple[Row, ...]:
    """Those whose policy is installed here."""
    installed = {entry.name for entry in entry_points(group="qmp_upm.policies")}
    return tuple(row for row in _ROWS if row.name not in OURS or row.name in installed)


def describe(names: Container[str]) -> tuple[Row, ...]:
    """Those of these names, in the order of the tables."""
    return tuple(row for row in _ROWS if row.name in names)


def in_turn(number: int) -> tuple[Row, ...]:
    """The rows in the order of a round: each round begins elsewhere, every second one backwards."""
    found = rows()
    at = number % len(found)
    first, *others = found[at:] + found[:at]
    return (first, *others[::-1]) if number % 2 else (first, *others)


def daemon_config(sockets: Mapping[Row, str], directory: str) -> str:
    """One daemon for the VMs of these rows: their monitors, by row; telemetry in ``directory``."""
    tables = "".join(
        f'[vms.{row.slug}]\nsocket = "{socket}"\n'
        f"budget = {BUDGET if row.limited else NO_LIMIT}\npolicy = {{ {row.policy} }}\n"
        for row, socket in sockets.items()
        if row.policy
    )
    return (
        f'[telemetry]\ndirectory = "{directory}"\n[metrics]\nlisten = ""\n'
        f'[control]\nsocket = "{directory}/control"\n'
        f'[defaults]\nlease = "{LEASE_SECONDS} s"\n{tables}'
    )
