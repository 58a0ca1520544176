# SPDX-License-Identifier: GPL-2.0-or-later
"""RESULTS.md, from results.json: the tables, how each figure was had, and what it doesn't show."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from benchmarks.results import Machine, NativeRow, PricePoint, Results
from qmp_upm.units import format_size
from tests.lab.rows import BUDGET

TEMPLATE = Path(__file__).with_name("RESULTS.md.in")
NOT_RUN = "Not run.\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column is left, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


Column = tuple[str, Callable[[Any], str]]

_TIMES: tuple[Column, ...] = (
    ("row", lambda r: r.row),
    ("time / none", lambda r: f"{r.time_ratio_to_none:.3f}"),
    ("spread", lambda r: f"{r.spread:.3f}"),
    ("time / stock", lambda r: f"{r.time_ratio_to_stock:.3f}"),
)
_STALE: tuple[Column, ...] = (
    ("mean stale", lambda r: format_size(r.mean_stale_bytes)),
    ("peak", lambda r: format_size(r.peak_stale_bytes)),
    ("at the end", lambda r: format_size(r.end_stale_bytes)),
    ("mean stale / none", lambda r: f"{r.mean_stale_ratio_to_none:.3f}"),
)
_GUEST: tuple[Column, ...] = (
    *_TIMES,
    ("all on one processor / none", lambda r: f"{r.cycles_ratio_to_none:.3f}"),
    ("exits", lambda r: f"{r.exits:,}"),
    ("faults", lambda r: f"{r.faults:,}"),
    ("discards", lambda r: f"{r.discards:,}"),
    ("reused", lambda r: format_size(r.reused_bytes)),
    *_STALE,
    ("host memory, mean", lambda r: format_size(r.host_mean_bytes)),
    ("at the end", lambda r: format_size(r.host_end_bytes)),
)
_NATIVE: tuple[Column, ...] = (
    *_TIMES,
    ("wall / none", lambda r: f"{r.wall_ratio_to_none:.3f}"),
    ("boot, ms", lambda r: f"{r.boot_ms:.1f}"),
    ("boot / none", lambda r: f"{r.boot_ratio_to_none:.2f}"),
    *_STALE,
)
_FIRMWARE: tuple[Column, ...] = (
    ("where", lambda f: f.where),
    ("firmware", lambda f: f.firmware),
    ("kernel", lambda f: f.kernel),
    ("console reached", lambda f: ", ".join(f.reached) or "nothing"),
    ("network", lambda f: "yes" if f.network else "no"),
    ("conversions", lambda f: str(f.conversions)),
    ("disk requests: firmware", lambda f: str(f.transactions_firmware)),
    ("below 32 KiB", lambda f: str(f.below_32k)),
    ("kernel", lambda f: str(f.transactions_kernel)),
)


def _rows(columns: Sequence[Column], found: Sequence[object]) -> str:
    if not found:
        return NOT_RUN
    return table([name for name, _ in columns], ([cell(r) for _, cell in columns] for r in found))


def _flips(rows: list[NativeRow]) -> str:
    shapes = [(f.pages, f.threads) for f in rows[0].flips]
    names = [f"{format_size(p << 12)}, {t} thread{'s' * (t > 1)}" for p, t in shapes]
    parts = []
    for title, cell in (
        (
            "µs of processor time a flip (the two conversions alone, by the clock)",
            lambda f: f"{f.us:,.2f} ({f.convert_us:,.2f})",
        ),
        ("the same, to none", lambda f: f"{f.ratio_to_none:.3f}"),
        ("punches and faults a flip", lambda f: f"{f.punches:.2f}, {f.faults:.2f}"),
    ):
        parts.append(table((title, *names), ((r.row, *map(cell, r.flips)) for r in rows)))
    return "\n".join(parts)


def _prices(points: list[PricePoint]) -> str:
    policies = list(dict.fromkeys(p.policy for p in points))
    parts = []
    for workload in dict.fromkeys(p.workload for p in points):
        some = [p for p in points if p.workload == workload]
        prices = sorted({(p.discard_us, p.profile) for p in some})
        cost = {(p.discard_us, p.profile, p.policy): p for p in some}
        rows = []
        for us, profile in prices:
            cells = []
            for policy in policies:
                point = cost.get((us, profile, policy))
                cells.append(f"{point.cost_seconds:.4g}" if point else "")
            rows.append((f"{us:,.1f} µs, {profile}", *cells))
        parts.append(table((f"{workload}: seconds, by the price of a discard", *policies), rows))
    return "\n".join(parts)


def _machine(m: Machine) -> str:
    return table(
        ("", ""),
        (
            ("date", m.date),
            ("commit", m.commit),
            ("processor", f"{m.processors} x {m.processor}"),
            ("memory", format_size(m.memory_bytes)),
            ("kernel", m.kernel),
            ("QEMU", m.qemu),
            ("plugin", m.plugin),
            ("guest's KVM", m.guest_kvm),
            ("load before the run", f"{m.load:.2f}"),
            ("the run took", f"{m.seconds:.0f} s"),
        ),
    )


def _targets(results: Results) -> str:
    word = {True: "met", False: "**missed**", None: "not measured"}
    return table(
        ("promise", "at most", "measured", ""),
        (
            (t.what, f"{t.limit:g}", "" if t.measured is None else f"{t.measured:.4f}", word[t.met])
            for t in results.targets
        ),
    )


def report(results: Results, plots: Sequence[str], windows: Mapping[str, object]) -> str:
    """The whole of RESULTS.md. ``plots``: files, from its place; ``windows``: what was looked at.

    The words are the template's; every figure comes from ``results``.
    """
    rounds = max((r.rounds for r in (*results.guest, *results.native)), default=0)
    pictures = {f"plot_{Path(name).stem}": f"![{Path(name).stem}]({name})\n" for name in plots}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        dict.fromkeys(("plot_guest", "plot_stale", "plot_native", "plot_prices"), "")
        | pictures
        | {
            "rounds": rounds,
            "machine": _machine(results.machine),
            "targets": _targets(results),
            "guest": _rows(_GUEST, results.guest),
            "native": _rows(_NATIVE, results.native),
            "flips": _flips(results.native) if results.native else "",
            "firmware": _rows(_FIRMWARE, results.firmware),
            "prices": _prices(results.prices) if results.prices else NOT_RUN,
            "budget": format_size(BUDGET),
        }
        | windows
    )
