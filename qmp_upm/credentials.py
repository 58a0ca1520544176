# SPDX-License-Identifier: GPL-2.0-or-later
"""Which process listens at the other end of a UNIX socket."""

import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

_UCRED = struct.Struct("3i")
"""struct ucred: process, user, group."""


class Credentials(NamedTuple):
    """``process``: 0 if it is of a pid namespace that this one does not see. ``user``: its uid."""

    process: int
    user: int


ReadCredentials = Callable[[socket.socket], Credentials]


def read_credentials(link: socket.socket) -> Credentials:
    """Who called listen(2), as SO_PEERCRED of unix(7) has it. Raises OSError if it is gone."""
    size = _UCRED.size
    process, user, _ = _UCRED.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return Credentials(process, user)
