# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm advise``: which policy suits a VM, from a recording of it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmp_upm.cli.simulate import ProfileOption, TraceOption, WorkloadOption, load_timeline
from qmp_upm.units import format_seconds, format_size

if TYPE_CHECKING:
    from qmp_upm.simulator.advice import Advice

MEANING = {
    "sure": "every part of this trace, and prices twice or half as high, lead to the same advice",
    "likely": "most of this trace and of the prices tried lead to the same advice",
    "unsure": "the trace is too short or too uneven, or it hangs on the prices: record for longer",
}


def advise(
    *,
    trace: TraceOption = None,
    workload: WorkloadOption = None,
    profile: ProfileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list, one advice a profile.")] = False,
) -> None:
    """Say which policy costs least for a recorded VM, what it saves and holds, and how sure it is.

    Without --profile at the prices that were measured for our own benchmarks; calibrate this host
    for better ones. A trace is replayed with the budget that the VM had; for a workload, a budget
    is advised, too.
    """
    import numpy as np  # noqa: PLC0415 - heavy

    from qmp_upm.simulator.advice import advise as find_advice  # noqa: PLC0415
    from qmp_upm.simulator.profiles import find_profile  # noqa: PLC0415

    timeline, budget_bytes = load_timeline(workload, trace)
    advices = [
        find_advice(timeline, name, find_profile(name), np.random.default_rng(0), budget_bytes)
        for name in profile or ["measured"]
    ]
    if as_json:
        typer.echo(json.dumps([advice.to_json() for advice in advices]))
        return
    seconds, conversions = timeline.seconds, timeline.conversions
    typer.echo(f"{conversions:,} conversions in {seconds:,.1f} s")
    if timeline.dropped:
        typer.echo(f"note: {timeline.dropped:,} records were lost when it was recorded")
    for advice in advices:
        typer.echo("\n" + _text(advice))


def _text(advice: "Advice") -> str:
    run, support = advice.run, advice.support
    saved, spent = advice.saved_seconds, advice.eager.time_seconds
    share = f" ({saved / spent:.0%})" if spent else ""
    held = run.outcome
    file = str(Path(run.profile).absolute()) if run.profile.endswith(".toml") else None
    settings = advice.settings(file).replace("\n", "\n  ")
    return f"""at the prices of {run.profile}:
  {settings}
  saves  {format_seconds(saved)} of the {format_seconds(spent)}{share} that conversions, discards
         and faults take with QEMU's own discards
  holds  {format_size(round(held.mean_stale_bytes))} on average, \
{format_size(held.peak_stale_bytes)} at most
  costs  {run.ratio_to_optimum or 1:.2f} of what is possible, memory included
  {support.verdict}: {MEANING[support.verdict]}
         {support.bootstrap:.0%} of draws from {support.windows} windows agree
         advice from one half costs {support.halves:.2f} of the best in the other
         {support.prices:.0%} of other prices agree"""
