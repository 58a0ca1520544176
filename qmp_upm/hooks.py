# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the installed `qemu.qmp` still calls what this project overrides in it.

The bounds on what a peer may send hang on methods that are the library's own affair. A release that
renames one of them would lift the bounds without a word, so the daemon looks when it starts.
"""

import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from types import FunctionType

from qemu.qmp import QMPClient
from qemu.qmp.events import Events

from qmp_upm.errors import InstallError

HOOKS: Mapping[str, Iterable[type]] = {
    "_readline": QMPClient.__mro__,
    "_on_message": QMPClient.__mro__,
    "_cb_inbound": QMPClient.__mro__,
    "_cb_outbound": QMPClient.__mro__,
    "_bh_disconnect": QMPClient.__mro__,
    "_writer": QMPClient.__mro__,
    "_pending": QMPClient.__mro__,
    "put": (Events,),
}
"""What is overridden or read, and the classes of which one has to use it."""


def check_hooks(hooks: Mapping[str, Iterable[type]] = HOOKS) -> None:
    """InstallError if the library no longer uses one of them."""
    unused = [name for name, classes in hooks.items() if not _is_used(name, classes)]
    if unused:
        raise InstallError(
            f"qemu.qmp {version('qemu.qmp')} no longer uses {', '.join(unused)}, on which the "
            "daemon's limits depend",
            hint="install the release that this one was made for: pip install 'qemu.qmp==0.0.6'",
        )


def _is_used(name: str, classes: Iterable[type]) -> bool:
    """Whether a method of another name mentions it."""
    return any(
        isinstance(method := inspect.unwrap(found), FunctionType)
        and own != name
        and name in method.__code__.co_names
        for kind in classes
        for own, found in vars(kind).items()
        if callable(found)
    )
