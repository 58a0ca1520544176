# SPDX-License-Identifier: GPL-2.0-or-later
"""Monitors that come and go, found by looking: nobody has to tell the daemon of a VM.

A socket is known by its path and inode. The one of a VM that was started again has another inode,
so that its session need not wait for the end of its pause. A QEMU that was killed leaves its socket
behind: once nobody has listened there for a while, it counts as gone until it is another one.

A look takes time where somebody has filled a directory, so it is made in a thread, and has an end.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import translate

MONITORS_MOST = 4096
"""Sockets that globs may find: what is in their directories may not be ours alone."""
ENTRIES_MOST = 1 << 14
"""Entries of directories that one look may meet."""
DESERTED_SECONDS = 5.0
"""A socket at which nobody has listened for so long is no VM; QEMU listens as soon as it binds."""

Inode = tuple[int, int]
"""Number, and time of change in nanoseconds."""

_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Changes:
    """Since the last look: paths that came, went, or are another socket now."""

    came: tuple[str, ...]
    went: tuple[str, ...]
    renewed: tuple[str, ...]
    full: bool = False
    """There is more than MONITORS_MOST or ENTRIES_MOST, which is not looked at."""


class Discovery:
    """Looks at globs and at single paths. One call at a time, from any thread."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        """What the globs found at the last look, but for what is deserted."""
        self._inodes: dict[str, Inode] = {}
        self._deserted: dict[str, Inode] = {}

    def desert(self, path: str) -> None:
        """Nobody listens at the socket that was found there."""
        if path in self._inodes:
            self._deserted[path] = self._inodes[path]

    def look(self, globs: Iterable[str], paths: Iterable[str]) -> Changes:
        """What has changed. ``paths`` are looked at for renewal only; they may not exist."""
        scan = _Scan()
        inodes = scan.sockets(globs)
        self._deserted = {p: i for p, i in self._deserted.items() if inodes.get(p) == i}
        found = inodes.keys() - self._deserted.keys()
        for path in paths:
            if path not in found and (inode := _inode(path)):
                inodes[path] = inode
        came, went = found - self.found, self.found - found
        renewed = {p for p, inode in inodes.items() if self._inodes.get(p) != inode} - came
        self.found, self._inodes = found, inodes
        return Changes(tuple(sorted(came)), tuple(sorted(went)), tuple(sorted(renewed)), scan.full)


class _Scan:
    """Globs as of `glob`, without ``**``, that stop when they have met too much."""

    def __init__(self) -> None:
        self.full = False
        self._entries_left = ENTRIES_MOST

    def sockets(self, globs: Iterable[str]) -> dict[str, Inode]:
        found: dict[str, Inode] = {}
        for pattern in globs:
            root, *parts = pattern.split("/")
            for path in self._walk(root, parts):
                if len(found) >= MONITORS_MOST:
                    self.full = True
                    return found
                if inode := _inode(path):
                    found[path] = inode
        return found

    def _walk(self, folder: str, parts: list[str]) -> Iterator[str]:
        """Paths below ``folder`` that may be sockets."""
        head, *rest = parts
        if _MAGIC.search(head) is None:
            path = f"{folder}/{head}"
            yield from self._walk(path, rest) if rest else (path,)
            return
        matches = re.compile(translate(head)).match
        with suppress(OSError), os.scandir(folder or "/") as entries:
            for entry in entries:
                self._entries_left -= 1
                if self._entries_left < 0:
                    self.full = True
                    return
                if not matches(entry.name) or (entry.name[0] == "." and head[0] != "."):
                    continue
                if rest and entry.is_dir():
                    yield from self._walk(entry.path, rest)
                elif not rest and _may_be_socket(entry):
                    yield entry.path


def _may_be_socket(entry: "os.DirEntry[str]") -> bool:
    """As far as the directory itself says."""
    kinds: tuple[Callable[..., bool], ...] = (entry.is_file, entry.is_dir)
    return not any(kind(follow_symlinks=False) for kind in kinds)


def _inode(path: str) -> Inode | None:
    """None if there is no socket."""
    try:
        found = os.stat(path)  # noqa: PTH116 - hundreds of paths a second: a Path costs as much again
    except (OSError, ValueError):
        return None
    return (found.st_ino, found.st_ctime_ns) if stat.S_ISSOCK(found.st_mode) else None
