# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm doctor``: what would work here, and what to do about the rest."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from qmp_upm.doctor import Check

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "unknown": "dim"}


def doctor(
    qemu: Annotated[
        Path | None, typer.Option(help="The QEMU to check, if not the distribution's.")
    ] = None,
    socket: Annotated[
        list[Path] | None, typer.Option(help="The monitor of a running VM; may be given again.")
    ] = None,
    proc_root: Annotated[Path, typer.Option(help="Where proc is.")] = Path("/proc"),
    cgroup_root: Annotated[Path, typer.Option(help="Where cgroup v2 is.")] = Path("/sys/fs/cgroup"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check this host and a QEMU. Exit code 0 if qmp-upm would work, 1 if not."""
    from qmp_upm.doctor import Places, examine, find_qemu, works  # noqa: PLC0415 - see cli/run.py

    places = Places(proc=proc_root, cgroup=cgroup_root)
    checks = asyncio.run(examine(qemu or find_qemu(), socket or (), places))
    good = works(checks)
    if as_json:
        typer.echo(json.dumps({"works": good, "checks": [asdict(check) for check in checks]}))
    else:
        _print(checks, good)
    raise typer.Exit(0 if good else 1)


def _print(checks: "Sequence[Check]", good: bool) -> None:
    from rich.console import Console  # noqa: PLC0415

    console = Console(highlight=False)
    console.print(_table(checks))
    console.print(
        "qmp-upm would work here."
        if good
        else "qmp-upm would not work here: mend what fails, from the top."
    )


def _table(checks: "Sequence[Check]") -> "Table":
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        action = f"\n[italic]→ {escape(check.action)}[/italic]" if check.action else ""
        style = STYLES[check.status]
        table.add_row(
            f"[{style}]{check.status}[/{style}]", escape(check.name), escape(check.seen) + action
        )
    return table
