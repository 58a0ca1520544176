# SPDX-License-Identifier: GPL-2.0-or-later
"""Where conversions come from: the plugin's record, read from a cursor on."""

import contextlib

import numpy as np

from qmp_upm.errors import CommandError, MessageError
from qmp_upm.limits import RAM_MOST
from qmp_upm.pages import PageSet, Range
from qmp_upm.policy import Batch
from qmp_upm.protocol import READ_MOST, Copy, Query, Read, StaleRanges, read_message
from qmp_upm.qmp import Monitor
from qmp_upm.records import Records

STALE_MOST = 4096
"""Ranges asked for at a time when the whole ledger is read."""
LEDGER_TRIES = 3
"""Times that it is begun to be read: a region may go while it is."""


class PluginExits:
    """Conversions of one VM in batches. Every read renews the plugin's lease."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._sizes: dict[int, int] = {}
        self.cursor = 0
        self.drained = True
        self.unlisted = 0
        """Records left out, as of regions that QEMU did not list."""

    async def query(self) -> Query:
        """The plugin's state. Raises MessageError if it contradicts itself."""
        query = read_message(Query, await self._monitor.execute("x-upm-query"))
        self._sizes = {region.id: region.size for region in query.regions}
        if sum(self._sizes.values()) > RAM_MOST:
            raise MessageError(
                f"x-upm-query: {sum(self._sizes.values())} bytes of guest RAM",
                hint="the VM's QEMU or plugin is faulty; restart the VM",
            )
        if query.records.oldest > query.records.head:
            raise MessageError(
                "x-upm-query: the oldest record is newer than the newest",
                hint="the VM's QEMU or plugin is faulty; restart the VM",
            )
        return query

    def start(self, cursor: int) -> None:
        """Read from this record on."""
        self.cursor = cursor

    async def read(self) -> Batch:
        """What has been recorded since, or the first of it; ``drained`` says whether it was all.

        One reply: a guest that floods can't keep its session from deciding, nor others from theirs.
        """
        answer = await self._monitor.execute(
            "x-upm-read", {"cursor": self.cursor, "max": READ_MOST}
        )
        read = read_message(Read, answer)
        if read.cursor != self.cursor + read.dropped + len(read.records):
            raise MessageError(
                f"x-upm-read: the cursor goes from {self.cursor} to {read.cursor} with "
                f"{len(read.records)} records and {read.dropped} dropped",
                hint="the VM's QEMU or plugin is faulty; restart the VM",
            )
        records = await self._checked(read.records) if len(read.records) else read.records
        self.cursor = read.cursor
        self.drained = len(read.records) < READ_MOST
        return Batch(records, read.dropped)

    async def _checked(self, records: Records) -> Records:
        """Those of regions that are, or have been, listed. MessageError on a range beyond its end.

        A region that came and went between two reads is unknown by now, and empty: its records are
        left out, as all of regions that QEMU does not list must be, for their pages have no bound.
        """
        regions = set(records["region"].tolist())
        if regions - self._sizes.keys():
            known = self._sizes
            await self.query()
            self._sizes = {r: size for r, size in known.items() if r in regions} | self._sizes
        if unlisted := regions - self._sizes.keys():
            listed = ~np.isin(records["region"], list(unlisted))
            self.unlisted += int(len(records) - listed.sum())
            records = records[listed]
        for region in regions - unlisted:
            own = records[records["region"] == region]
            if (own["offset"] + own["size"]).max() > self._sizes[region]:
                raise MessageError(
                    f"x-upm-read: a record reaches beyond the end of region {region}",
                    hint="the VM's QEMU or plugin is faulty; restart the VM",
                )
        return records

    async def read_ledger(self, ranges_most: int) -> tuple[Query, dict[Copy, PageSet]]:
        """The plugin's state and its whole ledger. CommandError if regions go each time."""
        for _ in range(LEDGER_TRIES - 1):
            query = await self.query()
            with contextlib.suppress(CommandError):  # QEMU closed a region meanwhile
                return query, await self.read_stale(query, ranges_most)
        query = await self.query()
        return query, await self.read_stale(query, ranges_most)

    async def read_stale(self, query: Query, ranges_most: int) -> dict[Copy, PageSet]:
        """The plugin's whole ledger. MessageError if it has more ranges than there can be."""
        stale = {copy: PageSet() for copy in Copy}
        ranges = 0
        for region in query.regions:
            for copy in Copy:
                cursor, done = 0, False
                while not done:
                    answer = await self._monitor.execute(
                        "x-upm-stale",
                        {"copy": copy, "region": region.id, "cursor": cursor, "max": STALE_MOST},
                    )
                    part = read_message(StaleRanges, answer)
                    done = part.done
                    # Only a full reply can have a next one: else there would be no end to them.
                    if not done and (part.cursor <= cursor or len(part.ranges) < STALE_MOST):
                        raise MessageError(
                            "x-upm-stale: there is said to be more, and it does not advance",
                            hint="the VM's QEMU or plugin is faulty; restart the VM",
                        )
                    cursor = part.cursor
                    ranges += len(part.ranges)
                    if ranges > ranges_most:
                        raise MessageError(
                            f"x-upm-stale: more than {ranges_most} ranges, which no budget allows",
                            hint="it is read again; if that does not help, restart the VM",
                        )
                    for offset, size in part.ranges.tolist():
                        if offset + size > region.size:
                            raise MessageError(
                                f"x-upm-stale: a range beyond the end of region {region.id}",
                                hint="the VM's QEMU or plugin is faulty; restart the VM",
                            )
                        stale[copy].add(Range(region.id, offset, size))
        return stale
