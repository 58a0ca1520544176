# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: one module for each family of commands, put together here."""

import sys
from typing import Annotated, NoReturn

import typer

import qmp_upm
from qmp_upm.cli import (
    advise,
    calibrate,
    config,
    control,
    doctor,
    plugin,
    record,
    run,
    simulate,
    top,
)
from qmp_upm.errors import ConfigError, QmpUpmError
from qmp_upm.limits import printable

EXIT_CONFIG = 78
WORDS_MOST = 16 << 10
"""Characters of an error: a message may have words of a QEMU's, or of a VM's name."""

app = typer.Typer(
    help="Discard policies for the memory of confidential VMs, over QMP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("record")(record.record)
app.command("doctor")(doctor.doctor)
app.command("status")(control.status)
app.command("top")(top.top)
app.command("show")(control.show)
app.command("events")(control.events)
app.command("policies")(control.policies)
app.command("set-policy")(control.set_policy)
app.command("set-budget")(control.set_budget)
app.command("flush")(control.flush)
app.command("reload")(control.reload)
app.add_typer(plugin.app, name="plugin")
app.add_typer(config.app, name="config")
app.command("simulate")(simulate.simulate)
app.command("advise")(advise.advise)
app.command("calibrate")(calibrate.calibrate)


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


def main() -> NoReturn:
    """Entry point. Exit codes: 0 done, 1 failed, 2 usage, 78 configuration."""
    try:
        app()
    except QmpUpmError as error:
        said, hint = printable(error.message, WORDS_MOST), printable(error.hint, WORDS_MOST)
        typer.echo(f"qmp-upm: {said}\nhint: {hint}", err=True)
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else 1)
    sys.exit(0)
