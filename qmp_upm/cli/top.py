# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm top``: what the VMs are doing, in a table that is made anew every second."""

import asyncio
from enum import StrEnum
from typing import Annotated

import typer

from qmp_upm.cli.control import AsJson, Socket
from qmp_upm.paths import CONTROL_SOCKET


class Order(StrEnum):
    """What the table can be sorted by."""

    CONVERSIONS = "conversions"
    FLIPS = "flips"
    DISCARDS = "discards"
    STALE = "stale"
    USED = "used"
    REUSE = "reuse"
    STATE = "state"
    NAME = "name"


def top(
    *,
    socket: Socket = CONTROL_SOCKET,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds from one look to the next.")
    ] = 1.0,
    sort: Annotated[Order, typer.Option(help="What the table is sorted by.")] = Order.CONVERSIONS,
    once: Annotated[bool, typer.Option("--once", help="Print one table, and end.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Print so many tables, and end.")] = None,
    as_json: AsJson = False,
) -> None:
    """Watch the VMs: rates, stale memory by copy, and what it is good for. Ctrl-C ends it.

    FLIPS/s counts pages that were converted again, USED is the share of the budget, REUSE the share
    of all kept memory that was found again, DISC/s the discard requests done. With --json each look
    is a line.
    """
    if once and count is not None:
        raise typer.BadParameter("--once is --count 1", param_hint="--once")
    from qmp_upm.cli.looks import follow  # noqa: PLC0415 - takes its time

    try:
        asyncio.run(follow(socket, interval, sort, 1 if once else count, as_json))
    except (KeyboardInterrupt, asyncio.CancelledError):
        # How one ends it.
        return
