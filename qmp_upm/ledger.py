# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's mirror of the plugin's ledger, with the age of each stale copy.

Ages are layers, one for each batch, each with the pages that it converted in either direction: a
page is as old as the newest layer that has it, and older layers are never searched for it. They are
swept of it in time, one layer with each batch, so that all together stay near the size of what the
guest has converted. Neighbours are joined so that there are few; what is joined counts as the older
of the two. So that this errs little, those are joined whose times differ least for their age: no
age is overstated by more than a third on a guest that is watched for less than a day.

Invariants: a page is stale in one copy at most; each stale page is in a layer; layers are in order
of time. Between two looks at the plugin's figures the mirror may hold a page that the plugin has
discarded since, and miss one whose discard failed: `qmp_upm.serving` compares, and reads the
plugin's ledger anew where they differ.
"""

import heapq
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from qmp_upm.digest import Digest, Returns, digest, make_returns, no_sets
from qmp_upm.pages import Ints, PageSet, Runs
from qmp_upm.protocol import Copy
from qmp_upm.records import Records

LAYERS_MOST = 64
"""Past it, two neighbours are joined."""
JOIN_ALWAYS_NS = 1_000_000
"""Times that differ by less count as one: conversions come in batches no shorter than this."""
SAMPLED_RUNS = 256
SAMPLED_RETURNS = 2048
"""Of the runs that came back, at most so many are looked up, and of flips within a batch told."""


@dataclass(slots=True)
class _Layer:
    """Pages whose conversion, at about this time, made one copy or the other live."""

    time_ns: int
    live: dict[Copy, PageSet]
    spent: frozenset[Copy] = frozenset()
    """Copies of which no page is as old as this layer, nor will be again."""
    swept: bool = True
    """In this sweep, or too new for it."""


@dataclass(frozen=True)
class Cohort:
    """Copies that became stale at about the same time, and still are."""

    since_ns: int
    copy: Copy
    pages: PageSet


@dataclass(frozen=True)
class Applied:
    """What a batch changed: bytes that became stale, and bytes that were still there on return."""

    deferred_bytes: int
    reused_bytes: int


class Ledger:
    """Stale pages by copy and age. Times are CLOCK_MONOTONIC of the host, in nanoseconds."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._stale = no_sets()
        self._layers: list[_Layer] = []
        self._newer = PageSet()
        self._front: dict[Copy, Cohort | None] = dict.fromkeys(Copy)
        self._live = no_sets()
        self._last, self._kept, self._back = Digest(), no_sets(), no_sets()

    @property
    def stale_bytes(self) -> int:
        """Bytes of both copies."""
        return sum(pages.bytes for pages in self._stale.values())

    def stale(self, copy: Copy) -> PageSet:
        """A set of its own with the stale pages of one copy."""
        return self._stale[copy].copy()

    def entered(self, copy: Copy) -> Runs:
        """What the last batch left stale of this copy, as merged runs in order."""
        return self._last.entered[copy].runs()

    def bytes_of(self, copy: Copy) -> int:
        """Bytes of one copy."""
        return self._stale[copy].bytes

    def bytes_by_region(self, copy: Copy) -> dict[int, int]:
        """The same by the number of its region."""
        return self._stale[copy].bytes_by_region()

    def converted(self) -> PageSet:
        """A set of its own with the pages that the last batch converted."""
        pages = self._last.last[Copy.PRIVATE].copy()
        pages |= self._last.last[Copy.SHARED]
        return pages

    def oldest_ns(self, copy: Copy) -> int | None:
        """When the oldest copy that is still stale became so; None if there is none."""
        front = self._front[copy]
        if front is None or not front.pages:
            front = self._front[copy] = self._oldest_cohort(copy)
        return None if front is None else front.since_ns

    def older_than(self, copy: Copy, time_ns: int, within: PageSet | None = None) -> PageSet:
        """Pages that have been stale since ``time_ns`` or longer, of all or of those ``within``."""
        oldest_ns = self.oldest_ns(copy)
        if oldest_ns is None or oldest_ns > time_ns:
            return PageSet()
        pages = self.stale(copy) if within is None else within & self._stale[copy]
        for layer in reversed(self._layers):
            if layer.time_ns <= time_ns or not pages:
                break
            pages -= layer.live[copy.other]
        return pages

    def cohorts(self, copy: Copy) -> list[Cohort]:
        """All stale pages of a copy by age, the oldest first; LAYERS_MOST cohorts at most."""
        left, cohorts = self.stale(copy), []
        for layer in reversed(self._layers):
            pages = layer.live[copy.other] & left
            if pages:
                left -= pages
                cohorts.append(Cohort(layer.time_ns, copy, pages))
        return cohorts[::-1]

    def oldest(self, size: int) -> dict[Copy, PageSet]:
        """The oldest stale pages of both copies, ``size`` bytes rounded up to a page, or all."""
        chosen = no_sets()
        for cohort in heapq.merge(*map(self.cohorts, Copy), key=lambda c: c.since_ns):
            if size <= 0:
                break
            part = cohort.pages.first(size)
            size -= part.bytes
            chosen[cohort.copy] |= part
        return {copy: pages for copy, pages in chosen.items() if pages}

    def returns(self) -> Returns:
        """The flips of the last batch: runs that came back, and how long they had been away.

        Also those whose old copy had been discarded. Of very many, a sample with its weight.
        """
        step = -(-len(self._last.returns) // SAMPLED_RETURNS) or 1
        within = self._last.returns[::step].copy()
        within["weight"] *= step
        between = [self._came_back(copy) for copy in Copy if self._back[copy]]
        return np.concatenate((within, *between))

    def _came_back(self, copy: Copy) -> Returns:
        """Runs that came back to a copy, each as old as its first page, and kept if that was."""
        runs = self._back[copy].runs()
        step = -(-len(runs.region) // SAMPLED_RUNS) or 1
        runs = Runs(*(column[::step] for column in runs))
        pages = PageSet.of_runs(Runs(runs.region, runs.first, np.ones_like(runs.pages)))
        rows = make_returns(runs, copy is Copy.PRIVATE, 0, kept=False)
        rows["weight"] = step
        rows["kept"][_positions(runs, pages & self._kept[copy])] = 1
        for layer in reversed(self._layers[:-1]):
            if not pages:
                break
            found = pages & layer.live[copy.other]
            if found:
                pages.subtract(found)
                away_ns = max(0, self._layers[-1].time_ns - layer.time_ns)
                rows["away_ns"][_positions(runs, found)] = away_ns
        return rows

    def apply(self, records: Records, now_ns: int) -> Applied:
        """Follow conversions, in their order."""
        if not len(records):
            self._last, self._kept, self._back = Digest(), no_sets(), no_sets()
            return Applied(0, 0)
        change = digest(records)
        kept = {copy: change.first[copy] & self._stale[copy] for copy in Copy}
        back = {copy: change.first[copy] & self._live[copy.other] for copy in Copy}
        for copy in Copy:
            self._live[copy].subtract(change.last[copy.other])
            self._live[copy] |= change.last[copy]
            front = self._front[copy]
            for converted in change.last.values():
                self._stale[copy] -= converted
                if front is not None:
                    front.pages.subtract(converted)
            self._stale[copy] |= change.entered[copy]
        self._push(now_ns, change.last)
        self._last, self._kept, self._back = change, kept, back
        reused = change.reused_bytes + sum(pages.bytes for pages in kept.values())
        return Applied(change.deferred_bytes, reused)

    def remove(self, copy: Copy, pages: PageSet) -> None:
        """Take pages out: their discard has been asked for."""
        self._stale[copy] -= pages
        front = self._front[copy]
        if front is not None:
            front.pages.subtract(pages)

    def replace(self, stale: dict[Copy, PageSet], now_ns: int) -> None:
        """Begin again with what the plugin says is stale. Known ages are kept, others are now.

        So it is for what had been taken out and is still there, since its discard failed: it is as
        old as its conversion.
        """
        fresh = {copy: stale[copy].copy() for copy in Copy}
        for copy in Copy:
            fresh[copy] -= self._stale[copy]
            fresh[copy] -= self._live[copy.other]
            self._stale[copy] = stale[copy].copy()
        for layer in self._layers:
            layer.spent = frozenset()
        for copy in Copy:
            self._live[copy].subtract(fresh[copy])
            self._live[copy] |= fresh[copy.other]
        if any(fresh.values()):
            self._push(now_ns, {copy: fresh[copy.other] for copy in Copy})
        self._front = dict.fromkeys(Copy)
        self._last, self._kept, self._back = Digest(), no_sets(), no_sets()

    def forget_regions_but(self, known: Collection[int]) -> frozenset[int]:
        """Forget what is known of regions that are gone, such as those before a guest's reset.

        Returns which those were.
        """
        gone = frozenset(region for region in self._regions() if region not in known)
        for pages in self._sets():
            pages.drop_regions(gone)
        return gone

    def forget(self) -> None:
        """Nothing is stale, and nothing is known of any page: it is another VM's ledger now."""
        self.forget_regions_but(())
        self._layers.clear()
        self._front = dict.fromkeys(Copy)
        self._last, self._kept, self._back = Digest(), no_sets(), no_sets()

    def _sets(self) -> Iterator[PageSet]:
        yield self._newer
        yield from self._stale.values()
        yield from self._live.values()
        for layer in self._layers:
            yield from layer.live.values()
        for front in self._front.values():
            if front is not None:
                yield front.pages

    def _regions(self) -> set[int]:
        return {region for pages in self._sets() for region in pages.regions}

    def _oldest_cohort(self, copy: Copy) -> Cohort | None:
        if not self._stale[copy]:
            return None
        for at, layer in enumerate(self._layers):
            if copy in layer.spent:
                continue
            pages = layer.live[copy.other] & self._stale[copy]
            for newer in reversed(self._layers[at + 1 :]):
                if not pages:
                    break
                pages.subtract(newer.live[copy.other])
            if pages:
                return Cohort(layer.time_ns, copy, pages)
            layer.spent |= {copy}
        return None

    def _push(self, now_ns: int, live: dict[Copy, PageSet]) -> None:
        if len(self._layers) > LAYERS_MOST:
            self._join(now_ns)
        self._layers.append(_Layer(now_ns, live))
        self._sweep()

    def _sweep(self) -> None:
        """Take out of the next older layer what newer ones have; after the oldest, begin again."""
        layer = next((layer for layer in reversed(self._layers) if not layer.swept), None)
        if layer is None:
            self._newer = PageSet()
            for layer in self._layers:
                layer.swept = False
            return
        for pages in layer.live.values():
            pages.subtract(self._newer)
        for pages in layer.live.values():
            self._newer |= pages
        layer.swept = True

    def _join(self, now_ns: int) -> None:
        """Join the two neighbours whose times differ least for their age."""
        layers = self._layers
        times = [layer.time_ns for layer in layers]
        at = min(
            range(len(layers) - 1),
            key=lambda i: (times[i + 1] - times[i]) / (now_ns - times[i + 1] + JOIN_ALWAYS_NS),
        )
        newer, older = layers.pop(at + 1), layers[at]
        older.spent &= newer.spent
        older.swept |= newer.swept
        for copy in Copy:
            older.live[copy] -= newer.live[copy.other]
            older.live[copy] |= newer.live[copy]


def _positions(runs: Runs, firsts: PageSet) -> Ints:
    """Where in ``runs``, which are in order, those are that begin with one of these pages."""
    numbers = firsts.numbers()
    return np.searchsorted(runs.region << 32 | runs.first, numbers.region << 32 | numbers.first)
