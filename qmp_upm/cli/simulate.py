# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm simulate``: policies on a workload or a recorded trace, in virtual time."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmp_upm.errors import ConfigError
from qmp_upm.units import parse_size

if TYPE_CHECKING:
    from qmp_upm.simulator.compare import Run
    from qmp_upm.simulator.timeline import Timeline

WIDTH_LEAST = 110
"""Columns of a table, however narrow the terminal is: figures cut short are of no use."""

WorkloadOption = Annotated[
    str | None,
    typer.Option(help="A guest: ovmf, ovmf-pool, swiotlb, accept, balloon, hostile or random."),
]
TraceOption = Annotated[Path | None, typer.Option(help="A trace of 'qmp-upm record'.")]
ProfileOption = Annotated[
    list[str] | None, typer.Option(help="Prices: a name, or a file of 'qmp-upm calibrate'.")
]


def simulate(
    *,
    workload: WorkloadOption = None,
    trace: TraceOption = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="NAME[:key=value,...]; several side by side. Else all of ours."),
    ] = None,
    profile: ProfileOption = None,
    budget: Annotated[
        str | None, typer.Option(help="The most stale bytes. Else the trace's, or no limit.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the workload.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="A list of runs.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write PNG files to this directory.")] = None,
) -> None:
    """Replay conversions through policies: what each costs, holds and gives back.

    Costs are seconds of processor time, rent of held memory included; each is also compared with
    the clairvoyant optimum, which no policy can beat.
    """
    from qmp_upm.simulator.compare import PolicySpec, compare, our_policies  # noqa: PLC0415 - heavy
    from qmp_upm.simulator.profiles import PROFILES, find_profile  # noqa: PLC0415

    timeline, recorded_budget = load_timeline(workload, trace, seed)
    specs = [PolicySpec.parse(text) for text in policy] if policy else our_policies()
    profiles = {name: find_profile(name) for name in profile or PROFILES}
    budget_bytes = _budget(budget, recorded_budget)
    runs = compare(timeline, specs, profiles, time.process_time, budget_bytes=budget_bytes)
    _say_failures(runs)
    title = workload or str(trace)
    if as_json:
        typer.echo(json.dumps([run.to_json() for run in runs]))
    else:
        print_runs(title, runs)
    if report is not None or plot is not None:
        from qmp_upm.simulator.report import write_plots, write_report  # noqa: PLC0415 - matplotlib

        if plot is not None:
            write_plots(plot, title, timeline, runs, profiles)
        if report is not None:
            write_report(report, title, timeline, runs, profiles)


def load_timeline(
    workload: str | None, trace: Path | None, seed: int = 0
) -> "tuple[Timeline, int | None]":
    """What to replay, and the budget that it was recorded with, if any."""
    from qmp_upm.simulator.timeline import Timeline  # noqa: PLC0415 - heavy
    from qmp_upm.simulator.workloads import WORKLOADS, make_workload  # noqa: PLC0415
    from qmp_upm.trace import read_trace  # noqa: PLC0415

    if (workload is None) == (trace is None):
        raise ConfigError(
            "give either a workload or a trace",
            hint=f"--workload {'|'.join(WORKLOADS)}, or --trace FILE",
        )
    if workload is not None:
        return make_workload(workload, seed), None
    assert trace is not None  # noqa: S101 - for the type checker: one of them is given
    read = read_trace(trace)
    if read.torn_bytes:
        typer.echo(f"note: the last {read.torn_bytes} bytes of {trace} are torn off", err=True)
    return Timeline.of_trace(read), read.header.budget_bytes


def _budget(text: str | None, recorded: int | None) -> int:
    from qmp_upm.simulator.engine import UNLIMITED  # noqa: PLC0415 - heavy

    if text is None:
        return UNLIMITED if recorded is None else recorded
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"--budget: {error}", hint="for example --budget '64 MiB'") from error
    if not isinstance(size, int) or not 0 <= size <= UNLIMITED:
        raise ConfigError(
            f"--budget: {text!r} is out of bounds", hint="for example --budget '64 MiB'"
        )
    return size


def print_runs(title: str, runs: "list[Run]") -> None:
    """A table for each profile."""
    from rich.console import Console  # noqa: PLC0415 - heavy
    from rich.table import Table  # noqa: PLC0415

    from qmp_upm.simulator.table import COLUMNS, to_rows  # noqa: PLC0415

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH_LEAST)
    for profile in dict.fromkeys(run.profile for run in runs):
        table = Table(title=f"{title}, prices {profile}")
        table.add_column(COLUMNS[0], overflow="fold")
        for column in COLUMNS[1:]:
            table.add_column(column, justify="right", no_wrap=True)
        *rows, optimum = to_rows([run for run in runs if run.profile == profile])
        for row in rows:
            table.add_row(*row)
        table.add_section()
        table.add_row(*optimum)
        console.print(table)


def _say_failures(runs: "list[Run]") -> None:
    """What a session says in its log: each policy that failed, once, and why."""
    failed = {run.policy: run.outcome.fallen_back for run in runs if run.outcome.fallen_back}
    for policy, error in failed.items():
        typer.echo(
            f"qmp-upm: the policy {policy} failed, and its VM went on with eager: {error}\n"
            "hint: tell the policy's author",
            err=True,
        )
