# SPDX-License-Identifier: GPL-2.0-or-later
"""RESULTS.md, from results.json: the tables, how each figure was had, and what it doesn't show."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from benchmarks.results import Firmware, GuestRow, Machine, NativeRow, PricePoint, Results
from qmp_upm.units import format_size
from tests.lab.rows import BUDGET

TEMPLATE = Path(__file__).with_name("RESULTS.md.in")
NOT_RUN = "Not run.\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column is left, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _guest(rows: list[GuestRow]) -> str:
    head = (
        "row",
        "time / none",
        "spread",
        "time / stock",
        "all on one processor / none",
        "exits",
        "faults",
        "discards",
        "reused",
        "mean stale",
        "peak",
        "at the end",
        "mean stale / none",
        "host memory, mean",
        "at the end",
    )
    return table(
        head,
        (
            (
                r.row,
                f"{r.time_ratio_to_none:.3f}",
                f"{r.spread:.3f}",
                f"{r.time_ratio_to_stock:.3f}",
                f"{r.cycles_ratio_to_none:.3f}",
                f"{r.exits:,}",
                f"{r.faults:,}",
                f"{r.discards:,}",
                format_size(r.reused_bytes),
                format_size(r.mean_stale_bytes),
                format_size(r.peak_stale_bytes),
                format_size(r.end_stale_bytes),
                f"{r.mean_stale_ratio_to_none:.3f}",
                format_size(r.host_mean_bytes),
                format_size(r.host_end_bytes),
            )
            for r in rows
        ),
    )


def _native(rows: list[NativeRow]) -> str:
    head = (
        "row",
        "time / none",
        "spread",
        "time / stock",
        "wall / none",
        "boot, ms",
        "boot / none",
        "mean stale",
        "peak",
        "at the end",
        "mean stale / none",
    )
    return table(
        head,
        (
            (
                r.row,
                f"{r.time_ratio_to_none:.3f}",
                f"{r.spread:.3f}",
                f"{r.time_ratio_to_stock:.3f}",
                f"{r.wall_ratio_to_none:.3f}",
                f"{r.boot_ms:.1f}",
                f"{r.boot_ratio_to_none:.2f}",
                format_size(r.mean_stale_bytes),
                format_size(r.peak_stale_bytes),
                format_size(r.end_stale_bytes),
                f"{r.mean_stale_ratio_to_none:.3f}",
            )
            for r in rows
        ),
    )


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


def _firmware(found: list[Firmware]) -> str:
    head = (
        "where",
        "firmware",
        "kernel",
        "console reached",
        "network",
        "conversions",
        "disk requests: firmware",
        "below 32 KiB",
        "kernel",
    )
    return table(
        head,
        (
            (
                f.where,
                f.firmware,
                f.kernel,
                ", ".join(f.reached) or "nothing",
                "yes" if f.network else "no",
                str(f.conversions),
                str(f.transactions_firmware),
                str(f.below_32k),
                str(f.transactions_kernel),
            )
            for f in found
        ),
    )


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
            "guest": _guest(results.guest) if results.guest else NOT_RUN,
            "native": _native(results.native) if results.native else NOT_RUN,
            "flips": _flips(results.native) if results.native else "",
            "firmware": _firmware(results.firmware) if results.firmware else NOT_RUN,
            "prices": _prices(results.prices) if results.prices else NOT_RUN,
            "budget": format_size(BUDGET),
        }
        | windows
    )
