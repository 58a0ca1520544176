# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm plugin``: where the plugin is, and how QEMU loads it."""

import typer

from qmp_upm.plugin import plugin_env, plugin_path

app = typer.Typer(help="The plugin that runs inside QEMU.", no_args_is_help=True)


@app.command("path")
def show_path() -> None:
    """Print the file that QEMU has to preload."""
    typer.echo(plugin_path())


@app.command("env")
def show_env() -> None:
    """Print the variable that loads the plugin: env $(qmp-upm plugin env) qemu-system-x86_64 ..."""
    typer.echo(plugin_env())
