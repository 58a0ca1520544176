# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm run``: the daemon."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    config: Annotated[Path, typer.Option(help="The configuration, a TOML file.")],
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    proc_root: Annotated[Path, typer.Option(help="Where memory pressure is read.")] = Path("/proc"),
    cgroup_root: Annotated[
        Path, typer.Option(help="The same, of a VM's cgroup (version 2).")
    ] = Path("/sys/fs/cgroup"),
) -> None:
    """Serve the VMs of a configuration until SIGTERM."""
    from qmp_upm.configfile import load_config  # noqa: PLC0415 - 'plugin path' needs none of this
    from qmp_upm.daemon import serve  # noqa: PLC0415
    from qmp_upm.logs import configure_logs  # noqa: PLC0415
    from qmp_upm.pressure import PressureFiles  # noqa: PLC0415

    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(
            f"{log_level!r} is no level: debug, info, warning or error", param_hint="--log-level"
        )
    configure_logs(log_level)
    serve(load_config(config), PressureFiles(proc_root, cgroup_root))
