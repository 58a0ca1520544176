# SPDX-License-Identifier: GPL-2.0-or-later
"""The monitor of a QEMU, or the control socket of a daemon, that has just been started."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class Aside:
    """A monitor's client for commands out of band, which QEMU answers while its main loop hangs.

    Apart from the others: these share an event loop with all that is in the same thread.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(seconds)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw", encoding="utf-8")
        self._file.readline()
        self._ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})

    def cmd(self, name: str, **arguments: object) -> Any:
        """The return value, or None if the command was refused."""
        return self._ask({"exec-oob": name, "arguments": arguments}).get("return")

    def _ask(self, message: dict[str, object]) -> dict[str, Any]:
        self._file.write(json.dumps(message))
        self._file.flush()
        while True:
            reply: dict[str, Any] = json.loads(self._file.readline())
            if "event" not in reply:
                return reply

    def close(self) -> None:
        """Ends the connection."""
        self._file.close()
        self._socket.close()
