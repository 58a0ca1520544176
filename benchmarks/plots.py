# SPDX-License-Identifier: GPL-2.0-or-later
"""The pictures beside the tables."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.results import GuestRow, NativeRow, PricePoint, Results

MIB = 1 << 20
OURS = ("lazy", "batched", "adaptive")


def _save(figure: Any, folder: Path, name: str) -> str:
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=80)
    plt.close(figure)
    return f"{folder.name}/{name}.png"


def _color(row: str) -> str:
    return "tab:blue" if row in OURS else "tab:gray"


def guest(rows: list[GuestRow], folder: Path) -> str:
    """Time and memory of each row, side by side."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    names = [r.row for r in rows][::-1]
    colors = [_color(name) for name in names]
    time.barh(names, [r.time_ratio_to_none for r in rows][::-1], color=colors)
    time.axvline(1, color="black", linewidth=0.8)
    time.set_xlabel("guest's time / none")
    memory.barh(names, [r.mean_stale_bytes / MIB for r in rows][::-1], color=colors)
    memory.set_xlabel("mean stale memory, MiB")
    return _save(figure, folder, "guest")


def stale(raw_round: dict[str, Any], folder: Path) -> str:
    """Stale memory over time, of one round."""
    figure, axes = plt.subplots(figsize=(10, 4))
    styles = {"none": "-", "lazy": "--", "batched": "-.", "adaptive": ":"}
    for raw in raw_round["rows"]:
        if raw["row"] not in styles:
            continue
        samples = [dict(zip(raw["sample_fields"], s, strict=True)) for s in raw["samples"]]
        begin = samples[0]["wall_s"]
        axes.plot(
            [s["wall_s"] - begin for s in samples],
            [(s["stale_private"] + s["stale_shared"]) / MIB for s in samples],
            styles[raw["row"]],
            label=raw["row"],
        )
    axes.set_xlabel("seconds from power-on (as the lab counts them)")
    axes.set_ylabel("stale memory, MiB")
    axes.legend()
    return _save(figure, folder, "stale")


def native(rows: list[NativeRow], folder: Path) -> str:
    """Microseconds of a flip by size, for one thread."""
    figure, axes = plt.subplots(figsize=(10, 4.5))
    for row in rows:
        flips = [f for f in row.flips if f.threads == 1]
        axes.plot(
            [f.pages * 4 for f in flips],
            [f.us for f in flips],
            marker="o",
            linestyle="-" if row.row in OURS else "--",
            label=row.row,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_yscale("log")
    axes.set_xlabel("range, KiB")
    axes.set_ylabel("processor time of a flip, µs")
    axes.legend(fontsize=8, ncols=2)
    return _save(figure, folder, "native")


def prices(points: list[PricePoint], folder: Path) -> str:
    """Cost over the price of a discard; a panel for each workload, crosses for named profiles."""
    workloads = list(dict.fromkeys(p.workload for p in points))
    figure, panels = plt.subplots(1, len(workloads), figsize=(5 * len(workloads), 4), squeeze=False)
    for axes, workload in zip(panels[0], workloads, strict=True):
        for number, policy in enumerate(dict.fromkeys(p.policy for p in points)):
            for named, style in ((False, "."), (True, "x")):
                line = sorted(
                    (p.discard_us, p.cost_seconds)
                    for p in points
                    if (p.policy, p.workload) == (policy, workload)
                    and (p.profile != "varied") is named
                )
                axes.plot(
                    *zip(*line, strict=True),
                    marker=style,
                    linestyle="none" if named else "-",
                    color=f"C{number}",
                    label=None if named else policy,
                )
        axes.set(xscale="log", yscale="log", title=workload)
        axes.set_xlabel("price of a discard, µs")
        axes.set_ylabel("cost, s")
        axes.legend(fontsize=8)
    return _save(figure, folder, "prices")


def all_plots(results: Results, raw_guest: list[dict[str, Any]], folder: Path) -> list[str]:
    """Those for which there are figures; their names, from the report's place."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    if results.guest:
        made += [guest(results.guest, folder), stale(raw_guest[0], folder)]
    if results.native:
        made.append(native(results.native, folder))
    if results.prices:
        made.append(prices(results.prices, folder))
    return made
