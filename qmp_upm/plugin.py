# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the installed plugin is."""

from importlib.resources import files
from pathlib import Path

from qmp_upm.errors import InstallError


def plugin_path() -> Path:
    """The shared object that QEMU preloads. InstallError if it was not built."""
    path = Path(str(files("qmp_upm"))) / "_plugin" / "qmp-upm.so"
    if not path.is_file():
        raise InstallError(
            f"the plugin is not at {path}",
            hint="install the project with 'pip install .' or 'make build'; a checkout alone has "
            "no plugin",
        )
    return path


def plugin_env() -> str:
    """The variable that loads the plugin into a QEMU started with it."""
    return f"LD_PRELOAD={plugin_path()}"
