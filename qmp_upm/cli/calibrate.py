# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm calibrate``: the prices of this host, into a file."""

import os
import platform
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from qmp_upm.errors import MeasureError
from qmp_upm.prices import HELD_GIB_SECOND, Prices

if TYPE_CHECKING:
    from qmp_upm.calibrate import Fit


def calibrate(
    *,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write here, not to the terminal.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=4, max=10_000, help="Values for each median.")] = 60,
    held_gib_second: Annotated[
        float,
        typer.Option(min=0, max=3600, help="What a GiB held for a second is worth, in seconds."),
    ] = HELD_GIB_SECOND,
) -> None:
    """Measure the price of a discard on this host, for 'adaptive' and the profile of that file."""
    from qmp_upm.calibrate import measure, prices_of  # noqa: PLC0415 - heavy

    fits = measure(rounds, Random(0), time.perf_counter_ns)  # noqa: S311 - an order of turns
    text = _toml(prices_of(fits, held_gib_second), fits, rounds)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MeasureError(
            f"cannot write {output}: {error.strerror}", hint="give another file with -o"
        ) from error
    typer.echo(f"wrote {output}: a discard of one page costs {_single_us(fits):.1f} µs")


def _single_us(fits: "dict[str, Fit]") -> float:
    return 1e6 * sum(fit.call_s + fit.page_s for fit in fits.values()) / len(fits)


def _toml(prices: Prices, fits: "dict[str, Fit]", rounds: int) -> str:
    lines = [
        "# Prices of this host in seconds, by 'qmp-upm calibrate'. The keys of [prices] are those",
        "# of qmp_upm.prices.Prices. The conversion and the rent are assumptions, not measured.",
        "[prices]",
        *(f"{name} = {value:.4g}" for name, value in prices.model_dump().items()),
        "",
        "[measured]",
        f'when = "{time.strftime("%Y-%m-%d", time.gmtime())}"',
        f'kernel = "{platform.release()}"',
        f"processors = {os.cpu_count()}",
        f"rounds = {rounds}",
    ]
    for name, fit in fits.items():
        punches = ", ".join(f"{pages} = {seconds:.4g}" for pages, seconds in fit.punch_s.items())
        lines += [
            "",
            f"[measured.{name}]",
            f"discard_call = {fit.call_s:.4g}",
            f"discard_page = {fit.page_s:.4g}",
            f"refault_page = {fit.refault_s:.4g}",
            f"spread = {fit.spread:.2f}",
            f"punch_by_pages = {{ {punches} }}",
        ]
    return "\n".join(lines) + "\n"
