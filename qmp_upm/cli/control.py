# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that ask a running daemon, over its control socket."""

import asyncio
import json
import time
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmp_upm.errors import ControlError
from qmp_upm.paths import CONTROL_SOCKET

if TYPE_CHECKING:
    from qmp_upm.stats import VmView


def _complete_vm(context: typer.Context, incomplete: str) -> list[str]:
    """The names of the VMs that a daemon has; a shell that completes is not told of errors."""
    try:
        vms = _ask(context.params.get("socket") or CONTROL_SOCKET, "query-vms")
    except ControlError:
        return []
    return [vm["name"] for vm in vms if vm["name"].startswith(incomplete)]


def _complete_policy(incomplete: str) -> list[str]:
    """The policies that are installed here."""
    from importlib.metadata import entry_points  # noqa: PLC0415 - only for completion

    names = (entry.name for entry in entry_points(group="qmp_upm.policies"))
    return [name for name in names if name.startswith(incomplete)]


Socket = Annotated[
    Path,
    typer.Option(
        "--socket",
        envvar="QMP_UPM_SOCKET",
        readable=False,  # whether it is, the connection says, and what to do
        help="The daemon's control socket.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
Vm = Annotated[
    str,
    typer.Argument(
        help="The VM's name, as 'qmp-upm status' shows it.", autocompletion=_complete_vm
    ),
]


class Side(StrEnum):
    """A copy, for the completion of --copy."""

    PRIVATE = "private"
    SHARED = "shared"


def _ask(socket: Path, command: str, arguments: Mapping[str, object] | None = None) -> Any:
    from qmp_upm.client import ask  # noqa: PLC0415 - 'plugin path' needs none of this

    return ask(socket, command, arguments)


def read_views(answer: list[object]) -> list["VmView"]:
    """VMs as the daemon shows them; ControlError if it is of another release."""
    from pydantic import ValidationError  # noqa: PLC0415

    from qmp_upm.stats import VmView  # noqa: PLC0415

    try:
        return [VmView.model_validate(vm) for vm in answer]
    except ValidationError as error:
        raise ControlError(
            "the daemon answers as another release would",
            hint="restart it after an upgrade: systemctl restart qmp-upm",
        ) from error


def _print(renderable: Any) -> None:
    from rich.console import Console  # noqa: PLC0415

    Console().print(renderable)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def status(socket: Socket = CONTROL_SOCKET, as_json: AsJson = False) -> None:
    """List the VMs: state, policy, budget, stale memory by copy, conversions, and what was reused.

    CONV counts conversions, REUSED is memory that flipped back and was still there, REUSE its share
    of all that was kept.
    """
    answer = _ask(socket, "query-vms")
    if as_json:
        _print_json(answer)
        return
    from qmp_upm.cli import tables  # noqa: PLC0415

    views = read_views(answer)
    _print(tables.status(views) if views else "The daemon looks after no VM at the moment.")


def show(vm: Vm, socket: Socket = CONTROL_SOCKET, as_json: AsJson = False) -> None:
    """Show all that is known of one VM, and where each of its settings is from."""
    answer = _ask(socket, "query-vm", {"name": vm})
    settings = _ask(socket, "query-config", {"name": vm})
    if as_json:
        _print_json(answer | {"settings": settings})
        return
    from qmp_upm.cli import tables  # noqa: PLC0415

    [view] = read_views([answer])
    _print(tables.vm(view, settings, time.time()))


def set_policy(
    vm: Vm,
    policy: Annotated[
        str,
        typer.Argument(help="As 'qmp-upm policies' lists it.", autocompletion=_complete_policy),
    ],
    parameters: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="The policy's parameters.")
    ] = None,
    socket: Socket = CONTROL_SOCKET,
    as_json: AsJson = False,
) -> None:
    """Change a VM's policy, until the daemon is restarted or reloaded. Nothing is discarded by it.

    For example: qmp-upm set-policy db lazy max_age="5 s" high=0.8
    """
    values = dict(_parameter(text) for text in parameters or ())
    answer = _ask(socket, "set-policy", {"name": vm, "policy": policy, "parameters": values})
    if as_json:
        _print_json(answer)
    else:
        typer.echo(f"{vm}: policy {policy}")


def _parameter(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="parameters")
    if value[:1] in ("[", "{"):
        try:
            return key, json.loads(value)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r}: {error}", param_hint="parameters") from error
    return key, value


def set_budget(
    vm: Vm,
    size: Annotated[
        str,
        typer.Argument(help="Such as '512 MiB', or 'default': what the configuration says."),
    ],
    socket: Socket = CONTROL_SOCKET,
    as_json: AsJson = False,
) -> None:
    """Change how much stale memory a VM may hold, until the daemon is restarted or reloaded."""
    from qmp_upm.units import format_size, parse_size  # noqa: PLC0415

    try:
        budget = None if size == "default" else parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="SIZE") from error
    answer = _ask(socket, "set-budget", {"name": vm, "budget": budget})
    if as_json:
        _print_json(answer)
        return
    applies, own = answer["budget"], answer["own"]
    less = "" if applies == own else f" of its own {format_size(own)}: its part of [host] budget"
    typer.echo(f"{vm}: budget {format_size(applies)}{less}")


def flush(
    vm: Vm,
    copy: Annotated[Side | None, typer.Option(help="Only this one; both if left out.")] = None,
    socket: Socket = CONTROL_SOCKET,
    as_json: AsJson = False,
) -> None:
    """Give a VM's stale memory back to the host now."""
    from qmp_upm.units import format_size  # noqa: PLC0415

    side = {} if copy is None else {"copy": copy.value}
    answer = _ask(socket, "flush", {"name": vm} | side)
    if as_json:
        _print_json(answer)
    else:
        typer.echo(f"{vm}: {format_size(answer['bytes'])} given back")


def reload(socket: Socket = CONTROL_SOCKET, as_json: AsJson = False) -> None:
    """Have the daemon read its configuration again. If that has an error, nothing changes."""
    answer = _ask(socket, "reload")
    if as_json:
        _print_json(answer)
    else:
        typer.echo("reloaded")


def policies(socket: Socket = CONTROL_SOCKET, as_json: AsJson = False) -> None:
    """List the policies that the daemon has, with their parameters and defaults."""
    answer = _ask(socket, "query-policies")
    if as_json:
        _print_json(answer)
        return
    from qmp_upm.cli import tables  # noqa: PLC0415

    _print(tables.policies(answer))


def events(
    socket: Socket = CONTROL_SOCKET,
    as_json: AsJson = False,
    count: Annotated[
        int | None, typer.Option(min=1, help="End after so many; else with Ctrl-C.")
    ] = None,
) -> None:
    """Follow what happens: VMs that come and go, changes, budgets reached, policies that fail.

    With --json a line of JSON each.
    """
    try:
        asyncio.run(_follow(socket, as_json, count))
    except KeyboardInterrupt:
        # How one ends it.
        return


async def _follow(socket: Path, as_json: bool, count: int | None) -> None:
    from qmp_upm.client import connect  # noqa: PLC0415

    seen = 0
    async with connect(socket) as client:
        async for event in client.events():
            typer.echo(json.dumps(event) if as_json else _line(event))
            seen += 1
            if seen == count:
                return


def _line(event: Mapping[str, Any]) -> str:
    stamp = event.get("timestamp", {})
    at = datetime.fromtimestamp(stamp.get("seconds", 0)).astimezone()
    data = dict(event.get("data", {}))
    vm = data.pop("vm", "")
    rest = "  ".join(f"{key}={json.dumps(value)}" for key, value in data.items())
    return (
        f"{at:%Y-%m-%d %H:%M:%S}  {event['event']:<16}  {json.dumps(vm)[1:-1]:<16}  {rest}".rstrip()
    )
