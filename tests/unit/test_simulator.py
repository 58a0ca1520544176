# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulator against a model that goes page by page, for any trace and any policy."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from qmp_upm.errors import ConfigError, TraceError
from qmp_upm.pages import PAGE_BYTES, PageSet, Range
from qmp_upm.policy import (
    Batch,
    Decision,
    Discard,
    LedgerView,
    Parameters,
    Policy,
    Pressure,
    make_policy,
)
from qmp_upm.prices import Prices
from qmp_upm.protocol import Copy
from qmp_upm.records import Records, make_records
from qmp_upm.simulator.compare import PolicySpec, compare, our_policies, price
from qmp_upm.simulator.engine import UNLIMITED, Outcome, replay
from qmp_upm.simulator.machine import Machine
from qmp_upm.simulator.optimum import find_optimum
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.simulator.workloads import WORKLOADS, make_workload
from qmp_upm.trace import Read
from qmp_upm.units import NSEC

PAGES = 24
MSEC = NSEC // 1000

Step = tuple[int, int, int, bool, int]
# Region, first page, pages, to private, and milliseconds since the one before.
steps = st.lists(
    st.tuples(
        st.integers(1, 2),
        st.integers(0, PAGES - 1),
        st.integers(1, 8),
        st.booleans(),
        st.sampled_from([0, 1, 7, 40, 900]),
    ),
    min_size=1,
    max_size=40,
)
budgets = st.sampled_from([0, 1, 3, 10, 1000]).map(lambda pages: pages * PAGE_BYTES)
price_lists = st.builds(
    Prices,
    conversion=st.sampled_from([0.0, 1e-6]),
    discard_call=st.sampled_from([0.0, 5e-6, 7e-3]),
    discard_page=st.sampled_from([0.0, 1e-6]),
    refault_page=st.sampled_from([0.0, 2e-6]),
    held_gib_second=st.sampled_from([0.0, 0.1, 100.0]),
)


def to_records(rows: list[Step]) -> Records:
    """Rows as records that nobody has deferred yet."""
    now, made = 0, []
    for region, first, pages, private, pause in rows:
        now += pause * MSEC
        made.append((region, first * PAGE_BYTES, pages * PAGE_BYTES, int(private), 0, now, 1))
    return make_records(made)


def pages_of(pages: PageSet) -> set[tuple[int, int]]:
    """Region and number of each page."""
    return {
        (r.region, r.offset // PAGE_BYTES + i)
        for r in pages.ranges()
        for i in range(r.size // PAGE_BYTES)
    }


class AnyPolicy(Policy):
    """Decides at random, and asks for pages that are not stale, too."""

    def __init__(self, seed: int) -> None:
        super().__init__(Parameters())
        self.random = random.Random(seed)  # noqa: S311 - to be had again by the seed

    def decide(
        self,
        batch: Batch,  # noqa: ARG002 - the contract gives every policy the same arguments
        ledger: LedgerView,
        now_ns: int,
        pressure: Pressure,  # noqa: ARG002 - the same
    ) -> Decision:
        """Each choice by the throw of a die."""
        rng = self.random
        defer = frozenset(copy for copy in Copy if rng.random() < 0.8)
        discards = []
        for copy in Copy:
            what = rng.randrange(5)
            if what == 0:
                discards.append(Discard(copy, ledger.stale(copy), "all"))
            elif what == 1:
                wild = Range(rng.randint(1, 2), rng.randrange(PAGES) * PAGE_BYTES, 8 * PAGE_BYTES)
                discards.append(Discard(copy, PageSet.of(wild), "wild"))
            elif what == 2:
                some = ledger.oldest(rng.randrange(4) * PAGE_BYTES).get(copy, PageSet())
                discards.append(Discard(copy, some, "oldest"))
        wake = now_ns + rng.choice([1, 5, 500]) * MSEC if rng.random() < 0.7 else None
        return Decision(defer, tuple(discards), wake)


@dataclass
class Model:
    """What the plugin does, page by page and slowly."""

    budget: int
    stale: dict[tuple[int, int], Copy] = field(default_factory=dict)
    live: dict[tuple[int, int], Copy] = field(default_factory=dict)
    reused: int = 0
    refaulted: int = 0

    def convert(self, row: tuple[int, ...], defer: frozenset[Copy]) -> bool:
        """One conversion; whether its discard was deferred."""
        region, offset, size, private = row[:4]
        live = Copy.PRIVATE if private else Copy.SHARED
        first = offset // PAGE_BYTES
        mine = [(region, first + i) for i in range(size // PAGE_BYTES)]
        for page in mine:
            if self.stale.get(page) is live:
                del self.stale[page]
                self.reused += 1
            elif self.live.get(page) is live.other:
                self.refaulted += 1
            self.live[page] = live
        others = sum(page not in mine for page in self.stale)
        fits = live.other in defer and others + len(mine) <= self.budget
        for page in mine:
            self.stale.pop(page, None)
            if fits:
                self.stale[page] = live.other
        return fits


class AnyTrace(RuleBasedStateMachine):
    """The machine does what the model does, whatever is asked of it and in whatever order."""

    @initialize(rows=steps, budget=budgets)
    def begin(self, rows: list[Step], budget: int) -> None:
        """A trace and a budget."""
        self.records = to_records(rows)
        self.machine = Machine(Timeline(self.records), budget)
        self.model = Model(budget // PAGE_BYTES)
        self.at = 0

    @rule(count=st.integers(1, 12))
    def convert(self, count: int) -> None:
        """The guest goes on."""
        high = min(self.at + count, len(self.records))
        rows = self.records[self.at : high].tolist()
        expected = [self.model.convert(row, self.machine.deferred) for row in rows]
        assert self.machine.convert(self.at, high).tolist() == expected
        self.at = high

    @rule(defer=st.sets(st.sampled_from(list(Copy))))
    def configure(self, defer: set[Copy]) -> None:
        """Other modes for what comes."""
        self.machine.deferred = frozenset(defer)

    @rule(copy=st.sampled_from(list(Copy)), keep=st.integers(1, 5))
    def discard(self, copy: Copy, keep: int) -> None:
        """Some of what is stale goes."""
        gone = [p for i, p in enumerate(self.model.stale) if i % keep == 0]
        gone = [page for page in gone if self.model.stale[page] is copy]
        pages = PageSet.of(*(Range(r, p * PAGE_BYTES, PAGE_BYTES) for r, p in gone))
        assert self.machine.discard(pages) == len(gone)
        for page in gone:
            del self.model.stale[page]

    @invariant()
    def accounts_agree(self) -> None:
        """Pages stale, used again, fetched again; within the budget; and the books close."""
        if not hasattr(self, "machine"):
            return
        account, stale = self.machine.account, self.machine.stale_pages
        assert stale == len(self.model.stale)
        assert stale <= account.peak_pages <= self.model.budget
        assert account.reused_pages == self.model.reused
        assert account.refaulted_pages == self.model.refaulted
        assert account.deferred_pages == (
            account.reused_pages + account.requested_pages + account.superseded_pages + stale
        )


TestAnyTrace = AnyTrace.TestCase
TestAnyTrace.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def make_any(name: str) -> Callable[[int], Policy]:
    """One of ours, or one that throws dice."""
    return AnyPolicy if name == "any" else lambda _: PolicySpec.parse(name).make(CHEAP)


CHEAP = Prices(conversion=1e-6, discard_call=5e-6, discard_page=1e-6, refault_page=2e-6)
POLICIES = ["any", *(spec.text for spec in our_policies())]


@pytest.mark.parametrize("name", POLICIES)
@given(rows=steps, seed=st.integers(0, 1 << 20), budget=budgets, prices=price_lists)
@settings(max_examples=40, deadline=None)
def test_any_policy_on_any_trace(
    name: str, rows: list[Step], seed: int, budget: int, prices: Prices
) -> None:
    """The books close to the byte, the budget holds, and nobody beats the optimum."""
    timeline = Timeline(to_records(rows), 3 * NSEC)
    outcome = replay(timeline, make_any(name)(seed), budget)
    account = outcome.account
    assert account.deferred_pages * PAGE_BYTES == (
        (account.reused_pages + account.requested_pages + account.superseded_pages) * PAGE_BYTES
        + outcome.final_stale_bytes
    )
    assert all(m.stale_bytes <= m.peak_bytes <= budget for m in outcome.moments)
    assert outcome.mean_stale_bytes <= outcome.peak_stale_bytes * (1 + 1e-9)
    assert outcome.peak_stale_bytes <= budget
    best = find_optimum(timeline, prices)
    run = price(name, "", outcome, prices, best)
    assert run.cost_seconds >= best.cost_seconds * (1 - 1e-9)
    assert best.mean_stale_bytes <= best.peak_stale_bytes * (1 + 1e-9)


@given(rows=steps, budget=budgets)
def test_eager_holds_nothing(rows: list[Step], budget: int) -> None:
    """At no time, and every conversion is a hole punch."""
    outcome = replay(Timeline(to_records(rows), NSEC), make_policy("eager", {}), budget)
    assert (outcome.peak_stale_bytes, outcome.account.deferred_pages) == (0, 0)
    assert outcome.discards == len(rows)


@given(rows=steps)
def test_never_discarding_discards_nothing(rows: list[Step]) -> None:
    """Where no budget makes it."""
    outcome = replay(Timeline(to_records(rows), NSEC), make_policy("eager", {"copies": "none"}))
    assert (outcome.discards, outcome.discarded_bytes) == (0, 0)
    assert outcome.account.refaulted_pages == 0


@given(rows=steps, seed=st.integers(0, 1 << 20))
@settings(max_examples=30, deadline=None)
def test_a_replay_is_reproducible(rows: list[Step], seed: int) -> None:
    """The same policy on the same trace: the same books, the same moments."""
    outcomes = [replay(Timeline(to_records(rows), NSEC), AnyPolicy(seed), 40960) for _ in "ab"]
    assert outcomes[0].account == outcomes[1].account
    assert outcomes[0].moments == outcomes[1].moments


@given(
    gaps=st.lists(st.floats(0.001, 5), min_size=1, max_size=6),
    last=st.floats(0, 20),
    prices=price_lists,
)
def test_optimum_is_the_best_of_all_choices(gaps: list[float], last: float, prices: Prices) -> None:
    """For one page, every series of choices, held or discarded at once, is tried."""
    times = np.cumsum([0.0, *gaps])
    rows = [(1, 0, PAGE_BYTES, i % 2, 0, int(t * NSEC), 1) for i, t in enumerate(times)]
    timeline = Timeline(make_records(rows), int((times[-1] + last) * NSEC))
    ends = [*timeline.time_ns[1:].tolist(), timeline.end_ns]
    costs = []
    for kept in product([True, False], repeat=len(rows)):
        cost = prices.conversion * len(rows)
        for i, keep in enumerate(kept):
            seconds = (ends[i] - int(timeline.time_ns[i])) / NSEC
            drop = prices.discard_call + prices.discard_page
            drop += prices.refault_page * (i + 1 < len(rows))
            cost += prices.held_byte_second * PAGE_BYTES * seconds if keep else drop
        costs.append(cost)
    assert find_optimum(timeline, prices).cost_seconds == pytest.approx(min(costs))


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_reproducible(name: str) -> None:
    """The same seed makes the same conversions."""
    first, again = make_workload(name, 7), make_workload(name, 7)
    assert (first.records == again.records).all()
    assert np.unique(first.records["region"]).tolist() == [1]


def test_workloads_have_the_published_numbers() -> None:
    """Transactions and their sizes, ranges and bytes, as in the figures they are made after."""
    ovmf = make_workload("ovmf").records
    shared = ovmf["size"][ovmf["private"] == 0]
    assert (len(shared), int((shared < 32 << 10).sum())) == (5100, 5080)
    pool = make_workload("ovmf-pool").records
    assert (len(pool), int(pool["size"][pool["private"] == 0].sum())) == (34, 11 << 19)
    (block,) = make_workload("swiotlb").records
    assert 64 << 20 <= block["size"] <= 1 << 30
    accepted = make_workload("accept").records
    assert set(accepted["size"].tolist()) == {2 << 20}
    assert int(accepted["size"].sum()) == 4 << 30
    assert set(make_workload("balloon").records["size"].tolist()) == {PAGE_BYTES}


def hot_page(count: int, gap_ns: int) -> Timeline:
    """A page there and back, again and again."""
    rows = [(1, 0, PAGE_BYTES, i % 2, 0, i * gap_ns, 1) for i in range(count)]
    return Timeline(make_records(rows), count * gap_ns)


class Watching(Policy):
    """Keeps everything, and remembers what it was asked, and when it was there."""

    def __init__(self, fails_at: int | None = None, wakes_after_ns: int | None = None) -> None:
        super().__init__(Parameters())
        self.seen: list[tuple[Batch, int]] = []
        self.entered: list[int] = []
        self.life: list[str] = []
        self.fails_at = fails_at
        self._wakes_after_ns = wakes_after_ns

    def decide(
        self,
        batch: Batch,
        ledger: LedgerView,
        now_ns: int,
        pressure: Pressure,  # noqa: ARG002 - the contract gives every policy the same arguments
    ) -> Decision:
        """Nothing to discard."""
        self.life.append("asked")
        self.seen.append((batch, now_ns))
        self.entered.append(sum(int(ledger.entered(copy).pages.sum()) for copy in Copy))
        if len(self.seen) == self.fails_at:
            raise KeyError("oops")
        after_ns = self._wakes_after_ns
        wake_at_ns = None if after_ns is None else now_ns + after_ns
        return Decision(frozenset(Copy), wake_at_ns=wake_at_ns)

    def attached(self, ledger: LedgerView, now_ns: int) -> None:
        """Noted."""
        if len(self.seen) == 1:  # later ones are of ledgers that were read anew
            assert (ledger.stale_bytes, now_ns) == (0, self.seen[0][1])
        self.life.append("attached")

    def detached(self) -> None:
        """Noted."""
        self.life.append("detached")


def test_a_slow_daemon_loses_records_and_says_so() -> None:
    """More than the plugin's ring has between two reads: the policy learns how many were lost.

    As for a session that has read the plugin's ledger, nothing is known of single conversions.
    """
    policy = Watching()
    outcome = replay(hot_page(40_000, 1000), policy)
    assert outcome.dropped == sum(batch.dropped for batch, _ in policy.seen) > 0
    assert outcome.dropped + sum(len(batch) for batch, _ in policy.seen) == 40_000
    for (batch, _), entered in zip(policy.seen[1:], policy.entered[1:], strict=True):
        assert entered == (0 if batch.dropped else 1)


def test_recorded_reads_are_the_batches() -> None:
    """A trace that says when it was read, and what was lost, gives the policy the same."""
    reads = (Read(4, 5 * MSEC, 0), Read(4, 6 * MSEC, 9), Read(10, 20 * MSEC, 0))
    policy = Watching()
    outcome = replay(Timeline(hot_page(10, MSEC).records, reads=reads), policy)
    assert [(len(batch), now_ns, batch.dropped) for batch, now_ns in policy.seen] == [
        (0, 0, 0),
        (4, 5 * MSEC, 0),
        (0, 6 * MSEC, 9),
        (6, 20 * MSEC, 0),
    ]
    assert outcome.dropped == 9


def test_a_policy_lives_as_in_a_session() -> None:
    """Asked for modes, attached, asked when something is read, and detached."""
    policy = Watching()
    outcome = replay(hot_page(3, 30 * MSEC), policy)
    assert policy.life == ["asked", "attached", "asked", "asked", "asked", "detached"]
    assert outcome.fallen_back is None


def test_a_policy_that_fails_is_replaced_by_eager() -> None:
    """From then on nothing is kept, and the outcome says why."""
    policy = Watching(fails_at=3)
    outcome = replay(hot_page(10, 30 * MSEC), policy)
    assert outcome.fallen_back == "KeyError('oops')"
    assert policy.life[-1] == "asked"
    assert (outcome.account.deferred_pages, outcome.account.inline_pages) == (2, 8)
    assert outcome.final_stale_bytes == 0


def test_a_daemon_that_is_about_to_read_is_not_woken_before() -> None:
    """What was converted and not yet read says that it was on its way; in a pause it is woken."""
    rows = [(1, 0, PAGE_BYTES, i % 2, 0, at * MSEC, 1) for i, at in enumerate((0, 1, 50))]
    policy = Watching(wakes_after_ns=10 * MSEC)
    replay(
        Timeline(make_records(rows), reads=(Read(2, 5 * MSEC, 0), Read(3, 60 * MSEC, 0))), policy
    )
    asked = [(len(batch), now_ns // MSEC) for batch, now_ns in policy.seen]
    assert asked == [(0, 0), (2, 5), (0, 15), (0, 25), (0, 35), (0, 45), (1, 60)]


def test_empty_traces_are_refused() -> None:
    """With a hint."""
    with pytest.raises(TraceError, match="no conversions"):
        Timeline(make_records())


def test_a_trace_that_would_fill_memory_is_refused() -> None:
    """Ranges that overlap in very many pieces."""
    rows = [(1, i * PAGE_BYTES, (1 << 20) * PAGE_BYTES, 0, 0, i, 1) for i in range(8000)]
    with pytest.raises(TraceError, match="pieces"):
        Timeline(make_records(rows))


@pytest.mark.parametrize("text", ["lazy:5", "lazy:=5", "lazy:max_age", "lasy", "lazy:age=5"])
def test_bad_policies_have_a_hint(text: str) -> None:
    """What is wrong with it, and what there is."""
    with pytest.raises(ConfigError) as caught:
        PolicySpec.parse(text).make(CHEAP)
    assert caught.value.hint


def test_compare_prices_an_outcome() -> None:
    """Eager on a hot page: each conversion, call, page and fault at its price."""
    (run,) = compare(hot_page(10, MSEC), [PolicySpec.parse("eager")], {"p": CHEAP}, lambda: 0.0)
    assert run.cost_seconds == pytest.approx(10 * (1e-6 + 5e-6 + 1e-6) + 9 * 2e-6)
    assert run.to_json()["ratio_to_optimum"] == pytest.approx(
        run.cost_seconds / find_optimum(hot_page(10, MSEC), CHEAP).cost_seconds
    )


def outcome_of(text: str, timeline: Timeline) -> Outcome:
    """A policy as written, without a budget."""
    return replay(timeline, PolicySpec.parse(text).make(CHEAP), UNLIMITED)


def test_deferring_policies_reuse_hot_pages() -> None:
    """Under lazy and batched a hot page is not discarded between two flips."""
    for text in ("lazy", "batched"):
        outcome = outcome_of(text, hot_page(100, MSEC))
        assert outcome.account.reused_pages > 90
