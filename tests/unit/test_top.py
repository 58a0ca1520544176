# SPDX-License-Identifier: GPL-2.0-or-later
"""The live table: rates from differences, VMs that come and go, and what fits a terminal."""

import asyncio
import io
import json
import os
import pty
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qmp_upm.cli import app
from qmp_upm.cli.looks import Looks, Row, ordered, render, watch
from qmp_upm.cli.top import Order
from qmp_upm.control import ControlServer
from qmp_upm.errors import ControlError
from qmp_upm.protocol import Copy
from qmp_upm.stats import State


def later(host: Any, name: str, conversions: int, flips: int = 0) -> None:
    """More has happened in a VM."""
    stats = host.views[name].stats.snapshot()
    stats.followed_conversions += conversions
    stats.flips += flips
    stats.count_discard(Copy.PRIVATE, "age", 4096, 0)
    host.views[name] = host.views[name].model_copy(update={"stats": stats})


async def test_rates_are_differences(host: Any) -> None:
    """Per second of the clock between two looks; unknown at the first."""
    looks = Looks()
    assert looks.take(host.vms(), 10.0)[0].conversions is None
    later(host, "db", 3000, flips=20)
    db, web = looks.take(host.vms(), 12.0)
    assert (db.conversions, db.flips, db.discards, db.discarded_bytes) == (1500, 10, 0.5, 2048)
    assert (web.conversions, web.discards) == (0, 0)
    assert (db.reuse, db.used) == (0.25, 12288 / (1 << 28))


async def test_vms_come_and_go(host: Any) -> None:
    """A new one has no rates yet, nor has one whose counters began again; one that went is gone."""
    looks = Looks()
    web = host.views.pop("web")
    looks.take(host.vms(), 1.0)
    host.views["web"] = web
    assert [row.conversions for row in looks.take(host.vms(), 2.0)] == [0, None]
    host.views["db"].stats.followed_conversions = 100
    looks.take(host.vms(), 2.5)
    later(host, "db", -100)
    assert [row.conversions for row in looks.take(host.vms(), 3.0)] == [None, 0]
    del host.views["db"]
    assert [row.name for row in looks.take(host.vms(), 4.0)] == ["web"]
    assert looks.take(host.vms(), 4.0)[0].conversions is None


def row(name: str, rate: float | None = 0.0, **changes: object) -> Row:
    """A row with this rate everywhere."""
    fields: dict[str, Any] = {
        "name": name,
        "state": State.ATTACHED,
        "policy": "adaptive",
        **dict.fromkeys(("conversions", "flips", "discards", "discarded_bytes"), rate),
        "private_bytes": 1023 << 20,
        "shared_bytes": (1023 << 20) + 4096,
        "budget_bytes": 4 << 30,
        "used": rate,
        "reuse": rate,
    }
    return Row(**(fields | changes))


@pytest.mark.parametrize("order", Order)
def test_order(order: Order) -> None:
    """Most first, unknown last, names from A to Z where it is the same."""
    rows = [row("c", None), row("b", 1.0), row("a", 0.5), row("d", 1.0)]
    names = "".join(r.name for r in ordered(rows, order))
    assert names == ("abcd" if order in (Order.NAME, Order.STATE, Order.STALE) else "bdac")


def printed(rows: list[Row], width: int, lines: int | None = None) -> list[str]:
    """The table on a console of this width."""
    console = Console(file=io.StringIO(), width=width)
    console.print(render(rows, width, lines))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits(width: int) -> None:
    """The longest of everything in a line; only names are shortened."""
    long = row("n" * 60, 99_949.0, state=State.CONNECTING, used=1.0, reuse=1.0)
    lines = printed([long, row("x", None)], width)
    assert len(lines) == 4
    assert max(map(len, lines)) <= width
    assert "connecting" in lines[2]
    assert "99.9k" in lines[2]
    assert "1023.0 MiB" in lines[2]
    assert ("adaptive" in lines[2]) == (width == 120)
    assert "\N{HORIZONTAL ELLIPSIS}" in lines[2]


def test_it_is_as_high_as_the_terminal() -> None:
    """What has no room is counted."""
    lines = printed([row(str(i)) for i in range(300)], 80, 24)
    assert len(lines) == 24
    assert lines[-1] == "and 279 more"
    assert len(printed([row(str(i)) for i in range(21)], 80, 24)) == 23


def test_no_vms() -> None:
    """A host without VMs has a table without rows."""
    assert printed([], 80)[0].startswith("VMs: none; 0 conversions/s")


async def test_errors_after_the_first_look_are_told_and_it_goes_on() -> None:
    """A daemon that is restarted is waited for; one that was never there is an error."""
    said: list[object] = []
    answers: list[Any] = [[], ControlError("gone", hint="wait"), []]

    async def poll() -> Any:
        if not answers:
            raise KeyboardInterrupt
        answer = answers.pop(0)
        if isinstance(answer, ControlError):
            raise answer
        return answer

    with pytest.raises(KeyboardInterrupt):
        await watch(poll, said.append, lambda error: said.append(error.message), 0, None)
    assert said == [[], "gone", []]
    answers = [ControlError("gone", hint="wait")]
    with pytest.raises(ControlError):
        await watch(poll, said.append, said.append, 0, None)
    answers = [[], ControlError("gone", hint="wait")]
    with pytest.raises(ControlError):
        await watch(poll, said.append, None, 0, 5)


async def test_tables_for_scripts(server: ControlServer) -> None:
    """--count prints so many, each with rates; --json a line each."""
    options = ["top", "--socket", str(server.path), "--interval", "0.1"]
    invoke = CliRunner().invoke
    text = (await asyncio.to_thread(invoke, app, [*options, "--count", "2"])).output
    assert text.count("NAME") == 2
    assert "-" not in text.split()
    lines = (await asyncio.to_thread(invoke, app, [*options, "--once", "--json"])).output
    [look] = [json.loads(line) for line in lines.splitlines()]
    assert [vm["name"] for vm in look] == ["db", "web"]
    assert look[0]["conversions"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_leaves_the_terminal_as_it_was(server: ControlServer, number: int) -> None:
    """However it is ended, the screen from before comes back."""
    terminal, inner = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).with_name("qmp-upm"), "top", "--socket", server.path),
        stdout=inner,
        stderr=inner,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(inner)
    shown = b""
    async with asyncio.timeout(30):
        while b"web" not in shown:
            shown += await asyncio.to_thread(os.read, terminal, 1 << 16)
        process.send_signal(number)
        assert await process.wait() == 0
    shown += os.read(terminal, 1 << 16)
    os.close(terminal)
    assert shown.rpartition(b"\x1b[?1049h")[2].count(b"\x1b[?1049l") == 1
