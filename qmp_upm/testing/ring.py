# SPDX-License-Identifier: GPL-2.0-or-later
"""A model of the plugin's record of conversions: plugin/ring.c."""

from qmp_upm.protocol import RING_RECORDS


class FakeRing:
    """The last ``size`` records: [region, offset, size, private, deferred, time in ns, count]."""

    def __init__(self, size: int = RING_RECORDS) -> None:
        self.size = size
        self.head = self.sealed = self.dropped = 0
        self._kept: list[list[int]] = []

    @property
    def oldest(self) -> int:
        """The number of the oldest record that is still there."""
        return max(0, self.head - self.size)

    def append(self, record: list[int]) -> None:
        """Enter a record, or join it to a neighbour that nobody has read yet."""
        if self.head > self.sealed:
            last = self._kept[-1]
            region, offset, size, private, deferred, _, count = record
            if last[1] + last[2] == offset and [last[0], *last[3:5]] == [region, private, deferred]:
                last[2] += size
                last[6] += count
                return
        oldest = self.head - self.size
        if oldest >= 0 and self.sealed <= oldest:
            self.dropped += 1
        self._kept.append(record)
        self.head += 1
        if len(self._kept) > 2 * self.size:
            del self._kept[: -self.size]

    def read(self, cursor: int, most: int) -> tuple[list[list[int]], int, int]:
        """Records from ``cursor`` (at most ``head``), the next cursor, and how many were lost."""
        lost = max(0, self.oldest - cursor)
        at = cursor + lost - self.head + len(self._kept)
        records = [record.copy() for record in self._kept[at : at + most]]
        cursor += lost + len(records)
        self.sealed = max(self.sealed, cursor)
        return records, cursor, lost
