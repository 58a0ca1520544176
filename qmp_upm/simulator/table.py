# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs as rows of text, for the terminal and for the report."""

from collections.abc import Sequence

from qmp_upm.pages import PAGE_BYTES
from qmp_upm.simulator.compare import Run
from qmp_upm.simulator.optimum import Optimum
from qmp_upm.units import format_seconds, format_size

COLUMNS = (
    "policy",
    "time",
    "rent",
    "cost / optimum",
    "peak stale",
    "mean stale",
    "discards",
    "reused",
)


def to_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Runs at one profile, the cheapest first, and their optimum; a cell for each of COLUMNS."""
    ordered = sorted(runs, key=lambda run: run.cost_seconds)
    return [*map(_run_row, ordered), _optimum_row(runs[0].optimum)]


def _run_row(run: Run) -> tuple[str, ...]:
    outcome, ratio = run.outcome, run.ratio_to_optimum
    return (
        run.policy if outcome.fallen_back is None else f"{run.policy} (failed)",
        format_seconds(run.time_seconds),
        format_seconds(run.rent_seconds),
        "-" if ratio is None else f"{ratio:.3f}",
        format_size(outcome.peak_stale_bytes),
        format_size(round(outcome.mean_stale_bytes)),
        f"{outcome.discards:,}",
        format_size(outcome.account.reused_pages * PAGE_BYTES),
    )


def _optimum_row(best: Optimum) -> tuple[str, ...]:
    return (
        "optimum",
        format_seconds(best.time_seconds),
        format_seconds(best.rent_seconds),
        "1",
        format_size(best.peak_stale_bytes),
        format_size(round(best.mean_stale_bytes)),
        "",
        "",
    )
