# SPDX-License-Identifier: GPL-2.0-or-later
"""From the raw rounds to the rows of results.json."""

from collections.abc import Iterable
from statistics import median
from typing import Any

import numpy as np

from benchmarks.results import Flip, GuestRow, NativeRow
from tests.lab.rows import NONE, STOCK, describe

Raw = dict[str, Any]
COUNTED_HZ = 1e9


def mean_until(times: Iterable[float], values: Iterable[float], end: float) -> float:
    """Mean over [0, end] of a quantity sampled at these times, straight between samples."""
    t, v = np.asarray(list(times), float), np.asarray(list(values), float)
    grid = np.unique(np.concatenate([t[(t > 0) & (t < end)], [0.0, end]]))
    return float(np.trapezoid(np.interp(grid, t, v), grid) / end)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _of_rounds(rounds: list[dict[str, Raw]], row: str, key: str) -> float:
    return median(r[row][key] for r in rounds)


def _ratios(rounds: list[dict[str, Raw]], row: str, key: str, to: str) -> list[float]:
    return [_ratio(r[row][key], r[to][key]) for r in rounds]


def _guest_figures(raw: Raw, idle_seconds: float, processors: int) -> Raw:
    samples = [dict(zip(raw["sample_fields"], s, strict=True)) for s in raw["samples"]]
    begin = samples[0]["wall_s"]
    times = [s["wall_s"] - begin for s in samples]
    stale = [s["stale_private"] + s["stale_shared"] for s in samples]
    host = [s["memfd"] + s["unevictable"] + s["anonymous"] for s in samples]
    done = next(s for s in samples if s["wall_s"] >= raw["done_s"])
    counters = raw.get("counters", {})
    alone = processors > 1 or not done["vcpu_ns"]
    return {
        "cycles": raw["guest"]["cycles"],
        "time": raw["guest"]["cycles"] if alone else done["vcpu_ns"],
        "seconds": raw["guest"]["cycles"] / COUNTED_HZ if alone else done["vcpu_ns"] / 1e9,
        "daemon": (done["daemon_ns"] - samples[0]["daemon_ns"]) / 1e9,
        "errors": raw["guest"]["errors"],
        "mean_stale": mean_until(times, stale, idle_seconds),
        "peak_stale": raw.get("peak_stale_bytes", 0),
        "end_stale": stale[-1],
        "host_mean": mean_until(times, host, idle_seconds),
        "host_peak": max(host),
        "host_end": host[-1],
        "discards": counters.get("discards", 0),
        "reused": sum(v for k, v in counters.items() if k.startswith("reused-bytes")),
        **raw["exits"],
    }


def guest_rows(raw_rounds: list[Raw]) -> list[GuestRow]:
    """Of the guest's rounds, which all have the same rows."""
    rounds = [
        {x["row"]: _guest_figures(x, r["idle_seconds"], r["processors"]) for x in r["rows"]}
        for r in raw_rounds
    ]
    found = []
    for row in describe(rounds[0]):
        ratios = _ratios(rounds, row.name, "time", NONE)
        found.append(
            GuestRow(
                row=row.name,
                what=row.what,
                rounds=len(rounds),
                time_ratio_to_none=round(median(ratios), 4),
                spread=round(max(ratios) - min(ratios), 4),
                time_ratio_to_stock=round(median(_ratios(rounds, row.name, "time", STOCK)), 4),
                mean_stale_ratio_to_none=round(
                    median(_ratios(rounds, row.name, "mean_stale", NONE)), 4
                ),
                mean_stale_bytes=round(_of_rounds(rounds, row.name, "mean_stale")),
                peak_stale_bytes=max(r[row.name]["peak_stale"] for r in rounds),
                end_stale_bytes=round(_of_rounds(rounds, row.name, "end_stale")),
                guest_cycles=round(_of_rounds(rounds, row.name, "cycles")),
                cycles_ratio_to_none=round(median(_ratios(rounds, row.name, "cycles", NONE)), 4),
                work_seconds=round(_of_rounds(rounds, row.name, "seconds"), 4),
                daemon_seconds=round(_of_rounds(rounds, row.name, "daemon"), 4),
                exits=round(_of_rounds(rounds, row.name, "exits")),
                hypercalls=round(_of_rounds(rounds, row.name, "hypercalls")),
                faults=round(_of_rounds(rounds, row.name, "pf_taken")),
                discards=round(_of_rounds(rounds, row.name, "discards")),
                reused_bytes=round(_of_rounds(rounds, row.name, "reused")),
                host_peak_bytes=max(r[row.name]["host_peak"] for r in rounds),
                host_mean_bytes=round(_of_rounds(rounds, row.name, "host_mean")),
                host_end_bytes=round(_of_rounds(rounds, row.name, "host_end")),
                data_errors=max(r[row.name]["errors"] for r in rounds),
            )
        )
    return found


def _per_trip(turns: list[Raw], key: str) -> float:
    return median(t[key] / t["trips"] for t in turns)


def _native_figures(raw: Raw, idle_seconds: float) -> Raw:
    shapes: dict[tuple[int, int], Raw] = {}
    for shape in sorted({(t["pages"], t["threads"]) for t in raw["turns"]}, key=lambda s: s[::-1]):
        turns = [t for t in raw["turns"] if (t["pages"], t["threads"]) == shape]
        keys = ("cpu_ns", "total_ns", "convert_ns", "punches", "faults")
        shapes[shape] = {key: _per_trip(turns, key) for key in keys}
    times, stale = zip(*raw["samples"], strict=True)
    return {
        "shapes": shapes,
        "boot": raw["boot"]["cpu_ns"],
        "mean_stale": mean_until(times, stale, idle_seconds),
        "peak_stale": raw["peak_stale_bytes"],
        "end_stale": stale[-1],
    }


def _flip(rounds: list[dict[str, Raw]], row: str, shape: tuple[int, int]) -> Flip:
    def of(key: str) -> float:
        return median(r[row]["shapes"][shape][key] for r in rounds)

    def ratio(key: str) -> float:
        return median(
            _ratio(r[row]["shapes"][shape][key], r[NONE]["shapes"][shape][key]) for r in rounds
        )

    return Flip(
        pages=shape[0],
        threads=shape[1],
        us=round(of("cpu_ns") / 1000, 4),
        wall_us=round(of("total_ns") / 1000, 4),
        convert_us=round(of("convert_ns") / 1000, 4),
        ratio_to_none=round(ratio("cpu_ns"), 4),
        wall_ratio_to_none=round(ratio("total_ns"), 4),
        punches=round(of("punches"), 4),
        faults=round(of("faults"), 4),
    )


def native_rows(raw_rounds: list[Raw]) -> list[NativeRow]:
    """Of the native rounds, which all have the same rows."""
    rounds = [
        {x["row"]: _native_figures(x, r["idle_seconds"]) for x in r["rows"]} for r in raw_rounds
    ]
    first = min(rounds[0][NONE]["shapes"], key=lambda shape: (shape[1], shape[0]))
    found = []
    for row in describe(rounds[0]):
        pairs = [(r[row.name], r[NONE], r[STOCK]) for r in rounds]
        to_none = [
            _ratio(a["shapes"][first]["cpu_ns"], n["shapes"][first]["cpu_ns"]) for a, n, _ in pairs
        ]
        to_stock = [
            _ratio(a["shapes"][first]["cpu_ns"], s["shapes"][first]["cpu_ns"]) for a, _, s in pairs
        ]
        flips = [_flip(rounds, row.name, shape) for shape in rounds[0][NONE]["shapes"]]
        found.append(
            NativeRow(
                row=row.name,
                what=row.what,
                rounds=len(rounds),
                time_ratio_to_none=round(median(to_none), 4),
                spread=round(max(to_none) - min(to_none), 4),
                time_ratio_to_stock=round(median(to_stock), 4),
                mean_stale_ratio_to_none=round(
                    median(_ratios(rounds, row.name, "mean_stale", NONE)), 4
                ),
                mean_stale_bytes=round(_of_rounds(rounds, row.name, "mean_stale")),
                peak_stale_bytes=max(r[row.name]["peak_stale"] for r in rounds),
                end_stale_bytes=round(_of_rounds(rounds, row.name, "end_stale")),
                wall_ratio_to_none=flips[0].wall_ratio_to_none,
                boot_ms=round(_of_rounds(rounds, row.name, "boot") / 1e6, 3),
                boot_ratio_to_none=round(median(_ratios(rounds, row.name, "boot", NONE)), 4),
                boot_ratio_to_stock=round(median(_ratios(rounds, row.name, "boot", STOCK)), 4),
                flips=flips,
            )
        )
    return found
