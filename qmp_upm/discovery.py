# SPDX-License-Identifier: GPL-2.0-or-later
"""Monitors that come and go, found by looking: nobody has to tell the daemon of a VM.

A socket is known by its path and inode. The one of a VM that was started again has another inode,
so that its session need not wait for the end of its pause.
"""

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import iglob
from pathlib import Path

MONITORS_MOST = 4096
"""Sockets that globs may find: what is in their directories may not be ours alone."""


@dataclass(frozen=True)
class Changes:
    """Since the last look: paths that came, went, or are another socket now."""

    came: tuple[str, ...]
    went: tuple[str, ...]
    renewed: tuple[str, ...]


class Discovery:
    """Looks at globs and at single paths."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        """What the globs found at the last look."""
        self._inodes: dict[str, tuple[int, int]] = {}

    def look(self, globs: Iterable[str], paths: Iterable[str]) -> Changes:
        """What has changed. ``paths`` are looked at for renewal only; they may not exist."""
        found = set(_sockets(globs))
        came, went = found - self.found, self.found - found
        self.found = found
        before, self._inodes = self._inodes, {}
        renewed = []
        for path in found.union(paths):
            inode = _inode(path)
            if inode is None:
                continue
            self._inodes[path] = inode
            if path not in came and before.get(path) != inode:
                renewed.append(path)
        return Changes(tuple(sorted(came)), tuple(sorted(went)), tuple(sorted(renewed)))


def _sockets(globs: Iterable[str]) -> Iterator[str]:
    count = 0
    for pattern in globs:
        for path in iglob(pattern):  # noqa: PTH207 - Path.glob takes no absolute pattern
            if _inode(path) is None:
                continue
            count += 1
            if count > MONITORS_MOST:
                return
            yield path


def _inode(path: str) -> tuple[int, int] | None:
    """Inode and time of change; None if there is no socket."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return (found.st_ino, found.st_ctime_ns) if stat.S_ISSOCK(found.st_mode) else None
