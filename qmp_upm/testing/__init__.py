# SPDX-License-Identifier: GPL-2.0-or-later
"""Fakes to test policies and clients with: a QMP peer, and the plugin behind it.

::

    plugin = FakePlugin({"ram": 1 << 30})
    async with FakeVm(plugin).listening("/tmp/guest.monitor"):
        plugin.convert(1, 0, 4096, to_private=False)
"""

from qmp_upm.testing.faults import (
    Close,
    Delay,
    Drop,
    Fault,
    Flood,
    Garbage,
    GiantLine,
    Plan,
    Script,
    Split,
)
from qmp_upm.testing.peer import FakeQemu, ReplyError
from qmp_upm.testing.plugin import FakePlugin
from qmp_upm.testing.vm import FakeVm

__all__ = [
    "Close",
    "Delay",
    "Drop",
    "FakePlugin",
    "FakeQemu",
    "FakeVm",
    "Fault",
    "Flood",
    "Garbage",
    "GiantLine",
    "Plan",
    "ReplyError",
    "Script",
    "Split",
]
