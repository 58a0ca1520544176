# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs as a page of HTML that needs nothing else, and as PNG files. Needs the extra ``plot``."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from qmp_upm.errors import InstallError
from qmp_upm.prices import Prices
from qmp_upm.simulator.compare import Run
from qmp_upm.simulator.table import COLUMNS, to_rows
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.best td { border-top: 2px solid #888; color: #555; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
p.note { color: #555; }
"""

_NOTE = """Times are seconds of processor time at the prices named; rent is what the memory held is
worth. The optimum knows the future; no policy can cost less. Ratios include the conversions, which
all have to pay."""


def write_plots(
    directory: Path,
    title: str,
    timeline: Timeline,
    runs: Sequence[Run],
    profiles: Mapping[str, Prices],
) -> list[Path]:
    """PNG files in a directory, which is made. InstallError without matplotlib or room."""
    written = []
    for name, figure in _figures(title, timeline, runs, profiles).items():
        path = directory / f"{name}.png"
        _write(path, _png(figure))
        written.append(path)
    return written


def write_report(
    path: Path,
    title: str,
    timeline: Timeline,
    runs: Sequence[Run],
    profiles: Mapping[str, Prices],
) -> None:
    """One file of HTML with tables and pictures. InstallError without matplotlib or room."""
    figures = _figures(title, timeline, runs, profiles)
    parts = [
        f"<h1>Discard policies on {escape(title)}</h1>",
        f"<p>{timeline.conversions:,} conversions in {timeline.seconds:,.1f} s.</p>",
    ]
    for profile, prices in profiles.items():
        parts += [
            f"<h2>Prices: {escape(profile)}</h2>",
            f"<p class=note>{escape(_describe(prices))}</p>",
            _table([run for run in runs if run.profile == profile]),
            _image(figures[f"frontier-{_file_name(profile)}"], f"time against memory, {profile}"),
            _image(figures[f"stale-{_file_name(profile)}"], f"memory held over time, {profile}"),
        ]
    parts.append(f"<p class=note>{escape(_NOTE)}</p>")
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>qmp-upm: {escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )
    _write(path, page.encode())


def _figures(
    title: str, timeline: Timeline, runs: Sequence[Run], profiles: Mapping[str, Prices]
) -> "dict[str, Figure]":
    try:
        from qmp_upm.simulator.plots import plot_frontier, plot_stale  # noqa: PLC0415 - optional
    except ImportError as error:
        raise InstallError(
            "pictures need matplotlib, which is not installed", hint="pip install 'qmp-upm[plot]'"
        ) from error
    figures = {}
    for profile, prices in profiles.items():
        mine = [run for run in runs if run.profile == profile]
        name = _file_name(profile)
        figures[f"stale-{name}"] = plot_stale(title, timeline, mine)
        figures[f"frontier-{name}"] = plot_frontier(title, timeline, mine, profile, prices)
    return figures


def _table(runs: Sequence[Run]) -> str:
    *rows, optimum = to_rows(runs)
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in COLUMNS) + "</tr>"]
    lines += [f"<tr>{_cells(row)}</tr>" for row in rows]
    lines.append(f"<tr class=best>{_cells(optimum)}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _cells(row: Sequence[str]) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


def _describe(prices: Prices) -> str:
    return (
        f"a conversion {format_seconds(prices.conversion)}, a hole punch "
        f"{format_seconds(prices.discard_call)} and {format_seconds(prices.discard_page)} a page, "
        f"a page fetched again {format_seconds(prices.refault_page)}, a GiB held for a second "
        f"{format_seconds(prices.held_gib_second)}"
    )


def _image(figure: "Figure", text: str) -> str:
    data = base64.b64encode(_png(figure)).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _file_name(profile: str) -> str:
    """A profile may be a path."""
    return Path(profile).stem


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise InstallError(
            f"cannot write {path}: {error.strerror}", hint="give another place, or make room"
        ) from error
