# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm config``: what a configuration says, before the daemon takes it."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check and explain a configuration.", no_args_is_help=True)

DEFAULT = Path("/etc/qmp-upm/config.toml")
_File = Annotated[Path, typer.Option("--config", help="The configuration, a TOML file.")]


@app.command("check")
def check(config: _File = DEFAULT) -> None:
    """Say all that is wrong with a configuration: file, line, key and what to do. Exit code 78."""
    from qmp_upm.cli import EXIT_CONFIG  # noqa: PLC0415 - it imports this module
    from qmp_upm.configfile import read_config  # noqa: PLC0415 - pydantic takes its time

    loaded, problems = read_config(config)
    for problem in problems:
        typer.echo(f"{problem}\n    hint: {problem.hint}", err=True)
    if loaded is None:
        raise typer.Exit(EXIT_CONFIG)
    groups = sum(1 for table in loaded.vms.values() if table.match is not None)
    typer.echo(
        f"{config}: good; VMs by name: {len(loaded.static)}, globs for monitors: "
        f"{len(loaded.discovery)}, tables for groups: {groups}"
    )


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of the configuration, the installed policies' parameters included."""
    from qmp_upm.configschema import config_schema  # noqa: PLC0415 - loads every policy

    typer.echo(json.dumps(config_schema(), indent=2))


@app.command("show")
def show(
    vm: Annotated[str, typer.Argument(help="The VM's name, whether or not it is there.")],
    config: _File = DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print what a configuration says of a VM, and where. The daemon need not run."""
    from qmp_upm.configfile import load_config  # noqa: PLC0415
    from qmp_upm.settings import configured  # noqa: PLC0415
    from qmp_upm.units import format_setting  # noqa: PLC0415

    settings = configured(load_config(config), vm)
    if as_json:
        typer.echo(json.dumps([setting.__dict__ for setting in settings], indent=2))
        return
    width = max(len(setting.key) for setting in settings)
    for setting in settings:
        value = format_setting(setting.key, setting.value)
        typer.echo(f"{setting.key:{width}}  {value}  # {setting.source}")
