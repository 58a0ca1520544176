# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import qmp_upm
from qmp_upm.errors import ConfigError, QmpUpmError
from qmp_upm.plugin import plugin_env, plugin_path

EXIT_CONFIG = 78

app = typer.Typer(
    help="Discard policies for the memory of confidential VMs, over QMP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
plugin = typer.Typer(help="The plugin that runs inside QEMU.", no_args_is_help=True)
app.add_typer(plugin, name="plugin")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qmp-upm {qmp_upm.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: Annotated[Path, typer.Option(help="The configuration, a TOML file.")],
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve the VMs of a configuration until SIGTERM."""
    from qmp_upm.config import load_config  # noqa: PLC0415 - 'plugin path' needs none of this
    from qmp_upm.daemon import serve  # noqa: PLC0415
    from qmp_upm.logs import configure_logs  # noqa: PLC0415

    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(
            f"{log_level!r} is no level: debug, info, warning or error", param_hint="--log-level"
        )
    configure_logs(log_level)
    serve(load_config(config))


@plugin.command("path")
def show_path() -> None:
    """Print the file that QEMU has to preload."""
    typer.echo(plugin_path())


@plugin.command("env")
def show_env() -> None:
    """Print the variable that loads the plugin: env $(qmp-upm plugin env) qemu-system-x86_64 ..."""
    typer.echo(plugin_env())


def main() -> NoReturn:
    """Entry point. Exit codes: 0 done, 1 failed, 2 usage, 78 configuration."""
    try:
        app()
    except QmpUpmError as error:
        typer.echo(f"qmp-upm: {error.message}\nhint: {error.hint}", err=True)
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else 1)
    sys.exit(0)
