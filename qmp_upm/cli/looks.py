# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks at all VMs, one after the other: rates from their differences, as a table or as JSON."""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from qmp_upm.cli import tables
from qmp_upm.cli.control import read_views
from qmp_upm.cli.top import Order
from qmp_upm.client import connect
from qmp_upm.errors import ControlError
from qmp_upm.protocol import Copy
from qmp_upm.stats import State, VmStats, VmView
from qmp_upm.units import format_size

WIDE = 100
"""Columns of a terminal that has room for everything."""


@dataclass(frozen=True)
class Row:
    """A VM between two looks at it. Rates are per second, None at the first look."""

    name: str
    state: State
    policy: str
    conversions: float | None
    flips: float | None
    discards: float | None
    discarded_bytes: float | None
    private_bytes: int
    shared_bytes: int
    budget_bytes: int
    used: float | None
    """Share of the budget."""
    reuse: float | None
    """Of all the bytes that were kept, the share that was found again."""


class Looks:
    """Makes rows of what the daemon says, with rates since the look before."""

    def __init__(self) -> None:
        self._before: dict[str, Counter[str]] = {}
        self._time_s = 0.0

    def take(self, views: Sequence[VmView], now_s: float) -> list[Row]:
        """A look at all VMs, at a time of any steady clock."""
        now = {view.name: _counters(view.stats) for view in views}
        elapsed_s = now_s - self._time_s
        rows = [self._row(view, now[view.name], elapsed_s) for view in views]
        self._before, self._time_s = now, now_s
        return rows

    def _row(self, view: VmView, now: Counter[str], elapsed_s: float) -> Row:
        before = self._before.get(view.name)

        def rate(key: str) -> float | None:
            # A counter that fell is that of a daemon that began again.
            if before is None or elapsed_s <= 0 or now[key] < before[key]:
                return None
            return (now[key] - before[key]) / elapsed_s

        stale_bytes = sum(view.stale_bytes.values())
        return Row(
            view.name,
            view.state,
            view.policy,
            rate("conversions"),
            rate("flips"),
            rate("discards"),
            rate("discarded_bytes"),
            view.stale_bytes[Copy.PRIVATE],
            view.stale_bytes[Copy.SHARED],
            view.budget_bytes,
            stale_bytes / view.budget_bytes if view.budget_bytes else None,
            tables.reuse_ratio(view.stats),
        )


def _counters(stats: VmStats) -> Counter[str]:
    return Counter(
        conversions=stats.followed_conversions,
        flips=stats.flips,
        discards=sum(sum(reasons.values()) for reasons in stats.discards.values()),
        discarded_bytes=sum(sum(reasons.values()) for reasons in stats.discarded_bytes.values()),
    )


def ordered(rows: Sequence[Row], order: Order) -> list[Row]:
    """Most first, what is not known last; states and names from A to Z."""
    rows = sorted(rows, key=lambda row: row.name)
    if order is Order.NAME:
        return rows
    if order is Order.STATE:
        return sorted(rows, key=lambda row: row.state)

    def most(row: Row) -> float:
        if order is Order.STALE:
            return row.private_bytes + row.shared_bytes
        value: float | None = getattr(row, order.value)
        return -1.0 if value is None else value

    return sorted(rows, key=most, reverse=True)


class _Column(NamedTuple):
    header: str
    cell: Callable[[Row], str | Text]
    wide_only: bool = False


def _name(row: Row) -> Text:
    name = tables.plain(row.name)
    name.no_wrap, name.overflow = True, "ellipsis"
    return name


def _rate(value: float | None) -> str:
    return "-" if value is None else tables.format_count(value)


_TEXTS = (_Column("NAME", _name),)
_WORDS = (
    _Column("STATE", lambda row: tables.state_cell(row.state)),
    _Column("POLICY", lambda row: tables.plain(row.policy), wide_only=True),
)
_NUMBERS = (
    _Column("CONV/s", lambda row: _rate(row.conversions)),
    _Column("FLIPS/s", lambda row: _rate(row.flips)),
    _Column("PRIVATE", lambda row: format_size(row.private_bytes)),
    _Column("SHARED", lambda row: format_size(row.shared_bytes)),
    _Column("BUDGET", lambda row: format_size(row.budget_bytes), wide_only=True),
    _Column("USED", lambda row: tables.format_share(row.used)),
    _Column("REUSE", lambda row: tables.format_share(row.reuse)),
    _Column("DISC/s", lambda row: _rate(row.discards)),
    _Column("FREED/s", lambda row: format_size(int(row.discarded_bytes or 0)), wide_only=True),
)


def render(rows: Sequence[Row], width: int, lines: int | None = None) -> RenderableType:
    """The rows as a table of ``width`` columns, and as many of them as ``lines`` has room for."""
    groups = [
        [column for column in group if width >= WIDE or not column.wide_only]
        for group in (_TEXTS, _WORDS, _NUMBERS)
    ]
    table = tables.new_table(*((column.header for column in group) for group in groups))
    # The summary, the header, and the line that says how many are left out.
    room = len(rows) if lines is None else max(lines - 3, 0)
    for row in rows[:room]:
        table.add_row(*(column.cell(row) for group in groups for column in group))
    hidden = len(rows) - room
    more = [Text(f"and {hidden} more", "dim")] if hidden > 0 else []
    return Group(_summary(rows), table, *more)


def _summary(rows: Sequence[Row]) -> RenderableType:
    states = ", ".join(
        f"{count} {state}" for state, count in Counter(row.state for row in rows).most_common()
    )
    conversions = sum(row.conversions or 0 for row in rows)
    stale = sum(row.private_bytes + row.shared_bytes for row in rows)
    return Text(
        f"VMs: {states or 'none'}; {tables.format_count(conversions)} conversions/s; "
        f"stale: {format_size(stale)}",
        no_wrap=True,
        overflow="ellipsis",
    )


async def watch(
    poll: Callable[[], Awaitable[list[VmView]]],
    show: Callable[[list[Row]], None],
    complain: Callable[[ControlError], None] | None,
    interval_s: float,
    count: int | None,
) -> None:
    """Look every ``interval_s``, and show ``count`` looks that have rates, or all for ever.

    Once it has begun, ``complain`` is told of errors; without it they are raised.
    """
    looks = Looks()
    first = looks.take(await poll(), time.monotonic())
    if count is None:
        show(first)
    while count is None or count > 0:
        await asyncio.sleep(interval_s)
        try:
            views = await poll()
        except ControlError as error:
            if complain is None:
                raise
            complain(error)
            continue
        show(looks.take(views, time.monotonic()))
        count = None if count is None else count - 1


async def follow(
    socket: Path, interval_s: float, order: Order, count: int | None, as_json: bool
) -> None:
    """Look at the daemon's VMs until Ctrl-C, or ``count`` times: a screen, tables, or JSON."""

    async def poll() -> list[VmView]:
        async with connect(socket) as client:
            return read_views(await client.execute("query-vms"))

    console = Console()
    if as_json:

        def show(rows: list[Row]) -> None:
            typer.echo(json.dumps([asdict(row) for row in ordered(rows, order)]))

        await watch(poll, show, None, interval_s, count)
    elif count is not None or not console.is_terminal:
        await watch(
            poll,
            lambda rows: console.print(render(ordered(rows, order), console.width)),
            None,
            interval_s,
            count,
        )
    else:
        watching = asyncio.current_task()
        assert watching is not None  # noqa: S101 - it runs
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, watching.cancel)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            await watch(
                poll,
                lambda rows: live.update(
                    render(ordered(rows, order), console.width, console.height), refresh=True
                ),
                lambda error: live.update(
                    tables.plain(f"{error.message}; hint: {error.hint}", "red"), refresh=True
                ),
                interval_s,
                count,
            )
