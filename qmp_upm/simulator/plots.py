# SPDX-License-Identifier: GPL-2.0-or-later
"""Pictures of runs, by matplotlib: memory held over time, and time spent against memory held."""

from collections.abc import Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qmp_upm.pages import PAGE_BYTES
from qmp_upm.prices import Prices
from qmp_upm.simulator.compare import Run
from qmp_upm.simulator.optimum import Optimum, find_optimum
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.units import NSEC

POINTS_MOST = 2000
"""Of a line over time; more would not be seen."""
RENTS = np.geomspace(1e-6, 1e9, 76)
"""Factors on the rent, at each of which the optimum is a point of the frontier."""
WIDTH, HEIGHT = 8.0, 4.6
LOG_ABOVE = 20.0
"""Times that differ by more than this factor are drawn on a logarithmic axis."""
# Okabe and Ito's colours: told apart by nearly everybody.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"

mpl.use("Agg")


def plot_stale(title: str, timeline: Timeline, runs: Sequence[Run]) -> Figure:
    """Stale bytes over time, a line for each policy; the quiet end of a trace is cut short."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    busy_s = (int(timeline.time_ns[-1]) - timeline.start_ns) / NSEC
    shown_s = min(timeline.seconds, max(1.6 * busy_s, 20.0))
    lines = [_line(run, timeline.start_ns, shown_s) for run in runs]
    factor, unit = _size_unit(max((float(held.max()) for _, held in lines), default=0.0))
    for index, (run, (seconds, held)) in enumerate(zip(runs, lines, strict=True)):
        axes.plot(
            seconds,
            held / factor,
            label=run.policy,
            color=COLOURS[index % len(COLOURS)],
            linewidth=1.6,
            alpha=0.85,
            drawstyle="steps-post",
        )
    axes.set_xlim(0, shown_s)
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    axes.set_xlabel("seconds since the first conversion")
    axes.set_ylabel(f"stale copies held, {unit}")
    rest = timeline.seconds - shown_s
    more = f" (the remaining {rest:.0f} s are not shown)" if rest > 1 else ""
    _finish(axes, f"{title}: memory held over time{more}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def plot_frontier(
    title: str, timeline: Timeline, runs: Sequence[Run], profile: str, prices: Prices
) -> Figure:
    """Time against mean memory at some prices, with what is possible as a line."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    held, spent = _frontier(timeline, prices)
    means = [run.outcome.mean_stale_bytes for run in runs]
    most = max([float(held.max()), float(PAGE_BYTES), *means])
    least = min(value for value in [*means, *held.tolist(), most] if value > most / 1e7)
    size, size_unit = _size_unit(most)
    longest = max([float(spent.max()), *(run.time_seconds for run in runs)])
    time, time_unit = _time_unit(longest)
    # What lies between two optima is possible by turns only: a straight line, if the axes were.
    grid = np.append(0.0, np.geomspace(least / 10, most, 400))
    bound = np.interp(grid, held, spent)
    axes.plot(grid / size, bound * time, color="#888888", label="optimum at any rent", zorder=1)
    axes.fill_between(grid / size, bound * time, 0, color="#eeeeee", label="not possible", zorder=0)
    _scatter(axes, runs, find_optimum(timeline, prices), size, time)
    _scale(axes, least / size, most / size, float(spent.min()) * time, longest * time)
    axes.set_xlabel(f"stale copies held on average, {size_unit}")
    axes.set_ylabel(f"conversions, discards and faults, {time_unit}")
    _finish(axes, f"{title}: time against memory, prices {profile}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _scatter(axes: Axes, runs: Sequence[Run], best: Optimum, size: float, time: float) -> None:
    """A point for each policy, and a star for the optimum."""
    for index, run in enumerate(runs):
        axes.scatter(
            [run.outcome.mean_stale_bytes / size],
            [run.time_seconds * time],
            label=run.policy,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            s=70,
            zorder=3,
            alpha=0.9,
        )
    axes.scatter(
        [best.mean_stale_bytes / size],
        [best.time_seconds * time],
        label="optimum at these prices",
        facecolor="none",
        edgecolor="#000000",
        marker="*",
        s=210,
        zorder=4,
    )


def _scale(axes: Axes, least: float, most: float, floor: float, top: float) -> None:
    """Logarithmic where values differ much; nothing held has a place of its own at the left."""
    decade = 10.0 ** np.floor(np.log10(least))
    axes.set_xscale("symlog", linthresh=decade, linscale=0.6)
    axes.set_xlim(-0.15 * decade, 1.5 * most)
    axes.xaxis.set_major_formatter("{x:g}")
    if top > LOG_ABOVE * floor > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(floor / 1.5, top * 1.5)
    else:
        margin = 0.1 * (top - floor) or 0.1 * top or 1.0
        axes.set_ylim(floor - margin, top + margin)


def _line(run: Run, start_ns: int, shown_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and bytes, thinned: of neighbours the greatest is kept, so that no peak is lost."""
    points = [(start_ns, 0)]
    for before, now in pairwise([run.outcome.moments[0], *run.outcome.moments]):
        if now.peak_bytes > max(before.stale_bytes, now.stale_bytes):
            points.append(((before.now_ns + now.now_ns) // 2, now.peak_bytes))
        points.append((now.now_ns, now.stale_bytes))
    table = np.array(points, dtype=float)
    seconds, held = (table[:, 0] - start_ns) / NSEC, table[:, 1]
    inside = seconds <= shown_s
    seconds, held = seconds[inside], held[inside]
    if len(seconds) <= POINTS_MOST:
        return np.append(seconds, shown_s), np.append(held, held[-1])
    starts = np.linspace(0, len(seconds), POINTS_MOST, endpoint=False).astype(int)
    thinned = np.maximum.reduceat(held, starts)
    return np.append(seconds[starts], shown_s), np.append(thinned, held[-1])


def _frontier(timeline: Timeline, prices: Prices) -> tuple[np.ndarray, np.ndarray]:
    """Mean bytes and seconds of the optimum, the dearer memory is the less of it."""
    points = []
    for factor in RENTS:
        rent = (prices.held_gib_second or 1.0) * float(factor)
        best = find_optimum(timeline, prices.model_copy(update={"held_gib_second": rent}))
        points.append((best.mean_stale_bytes, best.time_seconds))
    held, spent = np.array(sorted(set(points))).T
    return held, spent


def _size_unit(most: float) -> tuple[float, str]:
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if most >= factor:
            return float(factor), unit
    return 1024.0, "KiB"


def _time_unit(most: float) -> tuple[float, str]:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if most * factor >= 1:
            return factor, unit
    return 1e6, "µs"


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
