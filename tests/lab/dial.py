# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor of a QEMU, or the control socket of a daemon, that has just been started."""

import time
from collections.abc import Callable
from pathlib import Path

from qemu.qmp import ConnectError
from qemu.qmp.legacy import QEMUMonitorProtocol

POLL_SECONDS = 0.02


def dial(path: Path, alive: Callable[[], bool], seconds: float) -> QEMUMonitorProtocol:
    """A client of it, once somebody listens, which is a moment after the socket is there.

    RuntimeError if that one is not ``alive``, or takes longer than ``seconds``.
    """
    end = time.monotonic() + seconds
    while alive() and time.monotonic() < end:
        if path.exists():
            client = QEMUMonitorProtocol(str(path))
            try:
                client.connect(negotiate=True)
            except ConnectError:
                client.close()
            else:
                return client
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"nobody has begun to listen on {path}")
