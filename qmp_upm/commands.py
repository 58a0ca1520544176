# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of the control socket: for each the model of its arguments, and what it does.

The models and docstrings are the only description; query-commands shows them. What a command
returns is made of pydantic models, dataclasses and JSON values.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

import qmp_upm
from qmp_upm.errors import ControlError, UnknownCommandError
from qmp_upm.host import Host
from qmp_upm.policy import GROUP, Policy
from qmp_upm.protocol import Copy
from qmp_upm.units import Bytes


class Arguments(BaseModel):
    """None."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class VmArguments(Arguments):
    """``name``: of a VM, as query-vms lists it."""

    name: Annotated[str, Field(min_length=1, max_length=256)]


class SetPolicyArguments(VmArguments):
    """``policy``: as query-policies lists it, with the ``parameters`` that it says there."""

    policy: Annotated[str, Field(min_length=1, max_length=64)]
    parameters: dict[str, Any] = Field(default_factory=dict)


class SetBudgetArguments(VmArguments):
    """``budget``: bytes, or a text with a unit; null for what the configuration says."""

    budget: Annotated[Bytes, StrictInt] | None


class FlushArguments(VmArguments):
    """``copy``: private or shared; both if it is left out."""

    side: Annotated[Copy | None, Field(alias="copy", strict=False)] = None


class Caller(Protocol):
    """What a command knows of the client that gave it."""

    host: Host

    def start_record(self, name: str) -> None:
        """Send the conversions of a VM to this client from now on."""

    def stop_record(self, name: str) -> None:
        """Send no more of them."""


ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


class _Command(NamedTuple):
    arguments: type[Arguments]
    run: Callable[[Caller, Any], Awaitable[object]]


_COMMANDS: dict[str, _Command] = {}


def _command(
    name: str, arguments: type[ArgumentsT]
) -> Callable[
    [Callable[[Caller, ArgumentsT], Awaitable[object]]],
    Callable[[Caller, ArgumentsT], Awaitable[object]],
]:
    def register(
        run: Callable[[Caller, ArgumentsT], Awaitable[object]],
    ) -> Callable[[Caller, ArgumentsT], Awaitable[object]]:
        _COMMANDS[name] = _Command(arguments, run)
        return run

    return register


async def execute(caller: Caller, name: str, arguments: Mapping[str, object]) -> object:
    """The return value of a command.

    Raises UnknownCommandError, ControlError on arguments that are none, and what the host raises.
    """
    command = _COMMANDS.get(name)
    if command is None:
        raise UnknownCommandError(
            f"the command {name[:64]} has not been found", hint="query-commands lists them"
        )
    try:
        checked = command.arguments.model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        known = (field.alias or key for key, field in command.arguments.model_fields.items())
        where = ".".join(str(part) for part in first["loc"][:1])
        raise ControlError(
            f"{name}: argument {where}: {first['msg'].removeprefix('Value error, ')}",
            hint=f"its arguments: {', '.join(known) or 'none'}",
        ) from error
    return await command.run(caller, checked)


def version() -> dict[str, object]:
    """The daemon's version, at the place where a QMP client looks for QEMU's."""
    numbers = (*map(int, qmp_upm.__version__.split("+")[0].split(".")), 0, 0)
    return {
        "qemu": dict(zip(("major", "minor", "micro"), numbers, strict=False)),
        "package": f"qmp-upm {qmp_upm.__version__}",
    }


@_command("query-commands", Arguments)
async def _query_commands(_caller: Caller, _arguments: Arguments) -> object:
    """The commands that there are, and the JSON Schema of their arguments."""
    return [
        {
            "name": name,
            "doc": inspect.getdoc(command.run),
            "arguments": command.arguments.model_json_schema(),
        }
        for name, command in _COMMANDS.items()
    ]


@_command("query-version", Arguments)
async def _query_version(_caller: Caller, _arguments: Arguments) -> object:
    """The version of this daemon."""
    return version()


@_command("query-vms", Arguments)
async def _query_vms(caller: Caller, _arguments: Arguments) -> object:
    """All VMs, with their state, policy and counters."""
    return caller.host.vms()


@_command("query-vm", VmArguments)
async def _query_vm(caller: Caller, arguments: VmArguments) -> object:
    """One VM."""
    return caller.host.vm(arguments.name)


@_command("query-held", VmArguments)
async def _query_held(caller: Caller, arguments: VmArguments) -> object:
    """What a VM holds as the daemon knows it: bytes, runs and a digest, by copy and region."""
    return caller.host.held_by(arguments.name)


@_command("query-config", VmArguments)
async def _query_config(caller: Caller, arguments: VmArguments) -> object:
    """Each setting that applies to a VM, and the file or command that it is from."""
    return caller.host.config_of(arguments.name)


@_command("query-policies", Arguments)
async def _query_policies(_caller: Caller, _arguments: Arguments) -> object:
    """The installed policies, and the JSON Schema of their parameters."""
    return [_describe(entry) for entry in sorted(entry_points(group=GROUP))]


def _describe(entry: EntryPoint) -> object:
    try:
        policy = entry.load()
    except Exception as error:  # noqa: BLE001 - a third party's module may raise anything
        return {"name": entry.name, "error": f"it can't be loaded: {error!r}"}
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        return {"name": entry.name, "error": "it is not a qmp_upm.policy.Policy"}
    module = inspect.getmodule(policy)
    return {
        "name": entry.name,
        "doc": "\n".join(filter(None, (inspect.getdoc(module), inspect.getdoc(policy)))),
        "parameters": policy.Parameters.model_json_schema(),
    }


@_command("set-policy", SetPolicyArguments)
async def _set_policy(caller: Caller, arguments: SetPolicyArguments) -> object:
    """Change a VM's policy until the daemon ends or reloads. Its ledger stays."""
    await caller.host.set_policy(arguments.name, arguments.policy, arguments.parameters)
    return {}


@_command("set-budget", SetBudgetArguments)
async def _set_budget(caller: Caller, arguments: SetBudgetArguments) -> object:
    """Change what a VM may hold, until the daemon ends or reloads. Returns what applies, bytes.

    ``budget`` is less than its ``own`` where the host's budget is divided.
    """
    return await caller.host.set_budget(arguments.name, arguments.budget)


@_command("flush", FlushArguments)
async def _flush(caller: Caller, arguments: FlushArguments) -> object:
    """Give a VM's stale copies back to the host now. Returns the bytes."""
    return {"bytes": await caller.host.flush(arguments.name, arguments.side)}


@_command("reload", Arguments)
async def _reload(caller: Caller, _arguments: Arguments) -> object:
    """Read the configuration again. If it has an error, nothing changes."""
    await caller.host.reload()
    return {}


@_command("record-start", VmArguments)
async def _record_start(caller: Caller, arguments: VmArguments) -> object:
    """Send a VM's conversions to this client, as events RECORDS."""
    caller.start_record(arguments.name)
    return {}


@_command("record-stop", VmArguments)
async def _record_stop(caller: Caller, arguments: VmArguments) -> object:
    """Send no more of them."""
    caller.stop_record(arguments.name)
    return {}
