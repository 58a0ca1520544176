# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that are appended to for ever and never fill a disk.

Each name has a file ``<name>.jsonl`` and, once that is full, older parts ``<name>.jsonl.<number>``,
the highest number the youngest. Invariants: all of them together never exceed the cap; only files
of these names are counted or deleted; a write that failed leaves no part of itself. What has to go
is taken from whoever holds most, oldest first: a VM that floods evicts nobody's but its own.

All methods run in one thread.
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

FILE_MODE = 0o640
FILES_MOST = 1 << 14
"""Files kept, whatever their sizes: a QEMU that takes a new name at each start makes new ones."""
FULL_LOW = 0.9
"""Share of the cap that is left in use when room is made, so that it is not made at each write."""

_OURS = re.compile(r"(?P<name>.+)\.jsonl(?:\.(?P<number>[0-9]{1,18}))?")


@dataclass(frozen=True)
class Part:
    """A file of ``size`` bytes. ``number``: None if it is the one that is written to.

    ``written``: when it last was, seconds since 1970.
    """

    path: Path
    name: str
    number: int | None
    size: int
    written: float


class CappedDirectory:
    """Appends to files of a directory; bytes for a file and for all of them are bounded."""

    def __init__(self, directory: Path, file_size: int, total_size: int) -> None:
        self.directory = directory
        self.evicted_bytes = 0
        self._file_size = file_size
        self._total_size = total_size
        self._used = total_size  # unknown: the first write looks

    def path(self, name: str) -> Path:
        """The file that is written to."""
        return self.directory / f"{name}.jsonl"

    def append(self, name: str, block: bytes) -> None:
        """Append whole lines. OSError if the disk refuses them; then nothing was written."""
        need = len(block) + 1
        if self._used + need > self._total_size:
            self._make_room(need)
        path = self.path(name)
        present = _size(path)
        if present and present + need > self._file_size:
            self._rotate(path)
            present = 0
        if not present:
            self._thin_out()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(path, flags, FILE_MODE)
        try:
            size = os.fstat(file).st_size
            # A daemon that was killed left a torn line: it must spoil no other.
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            try:
                self._used += _write_all(file, b"\n" + block if torn else block)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)

    def parts(self) -> list[Part]:
        """Every file of ours, each name's oldest part first."""
        found = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                match = _OURS.fullmatch(entry.name)
                if match is None or not entry.is_file(follow_symlinks=False):
                    continue
                number = int(match["number"]) if match["number"] else None
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found.append(
                    Part(Path(entry.path), match["name"], number, stat.st_size, stat.st_mtime)
                )
        return sorted(found, key=lambda part: (part.name, part.number is None, part.number or 0))

    def _rotate(self, path: Path) -> None:
        youngest = max((number for number, _ in older_parts(path)), default=0)
        path.rename(f"{path}.{youngest + 1}")

    def _make_room(self, need: int) -> None:
        """Look what there is, and delete until there is room for ``need`` bytes."""
        held: dict[str, list[Part]] = defaultdict(list)
        for part in self.parts():
            held[part.name].append(part)
        total = sum(part.size for parts in held.values() for part in parts)
        if total + need > self._total_size:
            enough = max(0, int(self._total_size * FULL_LOW) - need)
            while total > enough:
                most = max(held, key=lambda name: sum(part.size for part in held[name]))
                oldest = held[most].pop(0)
                self._evict(oldest)
                total -= oldest.size
        self._used = total

    def _thin_out(self) -> None:
        """Have room for one more file: those that were not written to for longest go."""
        parts = self.parts()
        if len(parts) >= FILES_MOST:
            parts.sort(key=lambda part: part.written)
            for part in parts[: len(parts) - FILES_MOST + 1]:
                self._evict(part)

    def _evict(self, part: Part) -> None:
        part.path.unlink(missing_ok=True)
        self.evicted_bytes += part.size


def older_parts(path: Path) -> list[tuple[int, Path]]:
    """The numbered parts of a file, oldest first."""
    found = []
    for other in path.parent.iterdir():
        match = _OURS.fullmatch(other.name)
        if match and match["number"] and f"{match['name']}.jsonl" == path.name:
            found.append((int(match["number"]), other))
    return sorted(found)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _write_all(file: int, block: bytes) -> int:
    view = memoryview(block)
    while view:
        view = view[os.write(file, view) :]
    return len(block)
