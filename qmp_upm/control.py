# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's control socket: a QMP server for the command line and any other QMP client.

Who may connect is the file system's decision: the socket has mode 0600 from its birth, and 0660
once it has the group that may use it. A lock beside it, held until the process ends, says whose
socket it is; so one that is left over from a killed daemon can be replaced, and that of a live one
can not.
"""

import asyncio
import errno
import fcntl
import grp
import os
import socket
import stat
from pathlib import Path

import structlog

from qmp_upm.connection import Connection, Limits, refuse
from qmp_upm.errors import ControlError
from qmp_upm.host import Host

log = structlog.get_logger()

_DEFAULT_LIMITS = Limits()


class ControlServer:
    """Serves clients between `start` and `stop`. A client's task is its `Connection`."""

    def __init__(
        self,
        path: Path,
        host: Host,
        limits: Limits = _DEFAULT_LIMITS,
        *,
        group: str | None = None,
    ) -> None:
        self.path = path
        self._group = group
        self._host, self._limits = host, limits
        self._server: asyncio.Server | None = None
        self._lock: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. ControlError if another daemon does, or the path can't be a socket."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            listener = _bind(self.path, self._group)
        except OSError as error:
            self._unlock()
            raise ControlError(
                f"cannot make the control socket {self.path}: {error.strerror or error}",
                hint="set [control] socket to a path of 107 bytes at most that this user may make",
            ) from error
        except ControlError:
            self._unlock()
            raise
        self._server = await asyncio.start_unix_server(self._accept, sock=listener)

    async def stop(self) -> None:
        """Disconnect all clients, and take the socket away."""
        if self._server is None:
            return
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.path.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= self._limits.clients:
            refuse(
                writer,
                ControlError(
                    f"there are {len(self._tasks)} clients", hint="disconnect one, and try again"
                ),
            )
            return
        connection = Connection(reader, writer, self._host, self._limits)
        task = asyncio.create_task(connection.serve())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        task.add_done_callback(lambda _: writer.transport.abort())

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("control-client-died", error=repr(error), hint="report this", exc_info=error)


def _lock(path: Path) -> int:
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ControlError(
            f"another daemon serves {path}",
            hint="stop it, or give this one another [control] socket",
        ) from error
    return lock


def _bind(path: Path, group: str | None) -> socket.socket:
    """A socket at ``path``, in place of one that nobody listens on."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISSOCK(mode):
            raise ControlError(
                f"{path} is there, and is no socket", hint="remove it, or set [control] socket"
            )
        if _is_served(path):
            raise ControlError(
                f"another program serves {path}",
                hint="stop it, or give this daemon another [control] socket",
            )
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind() gives the file the mode of the socket's own inode: unix_bind_bsd() in Linux.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        if group is not None:
            _give(path, group)
    except (OSError, ControlError):
        listener.close()
        raise
    return listener


def _give(path: Path, group: str) -> None:
    """Let the members of a group connect. OSError, ControlError: nobody but us may."""
    try:
        number = grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise ControlError(
            f"[control] group: there is no group {group!r}", hint="make it, or name another one"
        ) from error
    os.chown(path, -1, number)
    path.chmod(0o660)


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        error = probe.connect_ex(str(path))
    # EAGAIN: it listens, and many are waiting.
    return error in (0, errno.EAGAIN)
