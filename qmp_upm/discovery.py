# SPDX-License-Identifier: GPL-2.0-or-later
"""Monitors that come and go, found by looking: nobody has to tell the daemon of a VM.

A socket is known by its path and inode. The one of a VM that was started again has another inode,
so that its session need not wait for the end of its pause.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import iglob
from itertools import chain, islice

MONITORS_MOST = 4096
"""Sockets that globs may find: what is in their directories may not be ours alone."""

Inode = tuple[int, int]
"""Number, and time of change in nanoseconds."""


@dataclass(frozen=True)
class Changes:
    """Since the last look: paths that came, went, or are another socket now."""

    came: tuple[str, ...]
    went: tuple[str, ...]
    renewed: tuple[str, ...]
    full: bool = False
    """There are more than MONITORS_MOST, which are not looked at."""


class Discovery:
    """Looks at globs and at single paths."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        """What the globs found at the last look."""
        self._inodes: dict[str, Inode] = {}

    def look(self, globs: Iterable[str], paths: Iterable[str]) -> Changes:
        """What has changed. ``paths`` are looked at for renewal only; they may not exist."""
        inodes = dict(_sockets(globs))
        found = set(inodes)
        for path in paths:
            if path not in found and (inode := _inode(path)):
                inodes[path] = inode
        came, went = found - self.found, self.found - found
        renewed = {p for p, inode in inodes.items() if self._inodes.get(p) != inode} - came
        self.found, self._inodes = found, inodes
        full = len(found) == MONITORS_MOST
        return Changes(tuple(sorted(came)), tuple(sorted(went)), tuple(sorted(renewed)), full)


def _sockets(globs: Iterable[str]) -> Iterator[tuple[str, Inode]]:
    paths = chain.from_iterable(map(iglob, globs))
    found = ((path, inode) for path in paths if (inode := _inode(path)))
    return islice(found, MONITORS_MOST)


def _inode(path: str) -> Inode | None:
    """None if there is no socket."""
    try:
        found = os.stat(path)  # noqa: PTH116 - hundreds of paths a second: a Path costs as much again
    except (OSError, ValueError):
        return None
    return (found.st_ino, found.st_ctime_ns) if stat.S_ISSOCK(found.st_mode) else None
