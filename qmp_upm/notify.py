# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon tells its service manager: systemd's notification protocol, sd_notify(3).

A datagram of ``KEY=value`` lines to the socket that ``$NOTIFY_SOCKET`` names. Without that variable
nothing is sent. Sending never waits: a service manager that does not read holds nobody up.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Self

import structlog

from qmp_upm.units import NSEC

BEATS = 3
"""Signs of life in a watchdog's time: one may be lost, another late."""
USEC = 1_000_000

log = structlog.get_logger()


class Notifier:
    """Talks to the service manager. ``watchdog_s``: it wants a sign of life so often; None: never.

    ``clock``: CLOCK_MONOTONIC in nanoseconds, as systemd compares it with its own.
    """

    def __init__(
        self,
        address: str | None,
        watchdog_s: float | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.watchdog_s = watchdog_s
        self._clock = clock
        self._said: str | None = None
        self._beaten_ns: int | None = None
        self._socket: socket.socket | None = None
        if address:
            self._address = "\0" + address[1:] if address[0] == "@" else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], process: int) -> Self:
        """As systemd told this process; a watchdog that is another process's is not ours."""
        usec = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(process)) == str(process)
        watchdog_s = int(usec) / USEC if ours and usec.isdecimal() and int(usec) else None
        return cls(environment.get("NOTIFY_SOCKET"), watchdog_s)

    def ready(self, status: str) -> None:
        """Started, or done with a reload."""
        self._send("READY=1", f"STATUS={status}")
        self._said = status

    def reloading(self) -> None:
        """SIGHUP is being followed. ``ready`` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={self._clock() * USEC // NSEC}")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1", "STATUS=leaving the VMs")

    def beat(self, lag_s: float, status: Callable[[], str]) -> None:
        """A sign of life from the event loop, whose timer was ``lag_s`` late.

        None is given for a loop that is late by half the watchdog's time. ``status`` is asked for,
        and said if it changed, no more often than once in a while.
        """
        period_s = (self.watchdog_s or 30.0) / BEATS
        now_ns = self._clock()
        if self._socket is None or (
            self._beaten_ns is not None and now_ns - self._beaten_ns < period_s * NSEC
        ):
            return
        if self.watchdog_s is not None and lag_s < self.watchdog_s / 2:
            self._send("WATCHDOG=1")
        self._beaten_ns = now_ns
        text = status()
        if text != self._said:
            self._send(f"STATUS={text}")
        self._said = text

    def close(self) -> None:
        """Nothing more is said."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning(
                "notify-failed",
                error=str(error),
                hint="the service manager set NOTIFY_SOCKET and does not listen there",
            )


def notifier() -> Notifier:
    """For this process. What it starts must not speak for it: the variables are taken away."""
    made = Notifier.from_environment(os.environ, os.getpid())
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        os.environ.pop(name, None)
    return made
