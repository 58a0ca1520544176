# SPDX-License-Identifier: GPL-2.0-or-later
"""What one peer can make the daemon keep, log, show or compute, all in one place.

A QEMU that a guest has taken over may say anything, as often and as long as it likes. What goes
beyond a limit costs its own VM: the session ends, says why in its state, and waits; or what is too
much is left out and counted. Others are not concerned.

| what | limit | beyond it |
|---|---|---|
| a message | MESSAGE_BYTES_MOST | the session ends |
| messages that nobody asked for | UNASKED_MESSAGES and UNASKED_BYTES, a second | the session ends |
| events that wait for the session | EVENTS_MOST | dropped; the whole ledger is read again |
| an error's text | ERROR_CHARACTERS, printable | cut, in log, state and telemetry |
| guest RAM | RAM_MOST, in regions that x-upm-query lists | the session ends |
| records of other regions | UNLISTED_MOST | left out and counted, then the session ends |
| pages known | KNOWN_BYTES_MOST of our memory | forgotten; the ledger is read again |
| names | one for a process and socket | a later one is not asked for |
| sockets | one session for a process | the others are refused |
| file descriptors | all but FILES_KEPT | the VM waits until others have left |
| parts of the budget | one for a process, else a default part for a user | shared |
| lease expiries | one in RECOVER_SECONDS | worked off together |
| events to clients, lines of the log | one of a kind in `guest.TELL_SECONDS` | left out |

A process is what SO_PEERCRED of unix(7) names. Process 0 is one of another pid namespace, and no
identity.
"""

import time
from collections.abc import Callable

MESSAGE_BYTES_MOST = 2 << 20
"""The longest message that is read: four times what the longest answer takes."""
EVENTS_MOST = 1024
"""Events kept for a session."""
ERROR_CHARACTERS = 256
"""Characters that are kept of a peer's error."""
FILES_KEPT = 32
"""File descriptors that no VM gets: control clients, metrics and telemetry need some, too."""
RAM_MOST = 1 << 45
"""Bytes of guest RAM that a VM may say it has: memory of ours is spent on knowing its pages."""
UNLISTED_MOST = 1 << 16
"""Records of regions that QEMU does not list: some come of a region that has just gone."""
KNOWN_BYTES_MOST = 32 << 20
"""Bytes of our memory for the pages that a guest has converted since it was started."""
UNASKED_MESSAGES = 2000
"""Events a second. A plugin rings once in ``notify``, and tells the end of each discard."""
UNASKED_BYTES = 1 << 20
"""Bytes of them a second."""
BURST_SECONDS = 2.0
"""What a peer that was quiet may send at once, in seconds of what it may always send."""
PENALTY_SECONDS = 30.0
"""Until a peer that went beyond what it may send is tried again."""
RECOVER_SECONDS = 1.0
"""From one answer to an expired lease to the next."""


def printable(text: str, most: int = ERROR_CHARACTERS) -> str:
    """At most so many characters of a peer's text, of which none acts on a terminal."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return cut if cut.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in cut)


class Allowance:
    """So much a second, and more at once after a pause (a token bucket)."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._left = self._most = per_second * BURST_SECONDS
        self._time_s = clock()

    def take(self, amount: float) -> bool:
        """Whether there is so much; it is taken in any case."""
        now_s = self._clock()
        gained = (now_s - self._time_s) * self._per_second
        self._left = min(self._most, self._left + gained) - amount
        self._time_s = now_s
        return self._left >= 0
