# SPDX-License-Identifier: GPL-2.0-or-later
"""Somebody who asks the plugin, while QEMU launches a guest, for what it must not do then."""

import threading
import time
from typing import Self

from tests.lab.launched import Launched

LEASE_MS = 5
UNLIMITED = 1 << 40
LAST = 2
"""Number of the discard that comes after those of a launch."""
MODES = {
    "eager": ("eager", "eager"),
    "defer private": ("defer", "eager"),
    "defer shared": ("eager", "defer"),
    "defer both": ("defer", "defer"),
}
"""Of the private and the shared copy."""
DISTURBANCES = ("nothing", "flush", "budget", "lease")


def configure(guest: Launched, mode: str) -> None:
    """Without a lease."""
    private, shared = MODES[mode]
    guest.main.cmd(
        "x-upm-configure",
        **{"private": private, "shared": shared, "budget": UNLIMITED, "lease-ms": 0},
    )


def await_discards(guest: Launched) -> None:
    """Until those asked for during a launch are made: they wait for the guest to run."""
    request = {"id": LAST, "copy": "both", "all": True}
    guest.main.clear_events()
    guest.wait(
        lambda: "return" in guest.main.cmd_raw("x-upm-discard", request), "an earlier discard"
    )
    while True:
        event = guest.main.pull_event(wait=guest.setup.patience_seconds)
        if event["event"] == "X_UPM_DISCARDED" and event["data"]["id"] == LAST:
            return


class Disturber:
    """A thread that asks as long as a launch goes on; ``asked`` is how often that was accepted.

    It has the guest's second monitor to itself: QEMU's main loop is busy with the launch. That
    goes no further than its first page until the plugin has been asked once.
    """

    def __init__(self, guest: Launched, kind: str) -> None:
        self._guest, self._kind = guest, kind
        self._ask = {
            "nothing": lambda: False,
            "flush": self._flush,
            "budget": self._lower_budget,
            "lease": self._leave,
        }[kind]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.asked = 0

    def __enter__(self) -> Self:
        if self._kind != "nothing":
            self._guest.hold.touch()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._guest.hold.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._over.is_set():
            if self._guest.is_launching() and self._ask() and self._guest.is_launching():
                self.asked += 1
                self._guest.hold.unlink(missing_ok=True)
            else:
                time.sleep(0.001)

    def _flush(self) -> bool:
        """So many discards may wait, and no more: False if it was one too many."""
        request = {"id": 1, "copy": "both", "all": True}
        return self._guest.side.cmd("x-upm-discard", **request) is not None

    def _lower_budget(self) -> bool:
        self._guest.side.cmd("x-upm-configure", budget=0)
        return self._guest.side.cmd("x-upm-configure", budget=UNLIMITED) is not None

    def _leave(self) -> bool:
        """Takes a short lease and says nothing more until it has run out."""
        self._guest.side.cmd("x-upm-configure", **{"lease-ms": LEASE_MS})
        time.sleep(2 * LEASE_MS / 1000)
        return True
