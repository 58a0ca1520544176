# SPDX-License-Identifier: GPL-2.0-or-later
"""The mirror of the plugin's ledger, and the policies on it."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmp_upm.digest import digest
from qmp_upm.errors import ConfigError
from qmp_upm.ledger import LAYERS_MOST, Ledger
from qmp_upm.pages import PAGE_BYTES, PageSet, Range
from qmp_upm.policy import Batch, Decision, Policy, Pressure, make_policy
from qmp_upm.protocol import Copy
from qmp_upm.records import Record, make_records
from qmp_upm.units import NSEC

conversions = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.integers(1, 20) | st.just(300),
        st.booleans(),
        st.booleans(),
        st.integers(1, 2),
    ),
    max_size=60,
)
REGION_PAGES = 1000
"""Tells the regions apart where page numbers are in one set."""
Step = tuple[int, int, bool, bool, int]


def record(first: int, pages: int, private: bool, deferred: bool, region: int = 1) -> Record:
    """A conversion."""
    size = pages * PAGE_BYTES
    return Record(region, first * PAGE_BYTES, size, int(private), int(deferred), 0, 1)


def page_numbers(pages: PageSet) -> set[int]:
    """The pages one by one, of whichever region."""
    return {
        page + (r.region - 1) * REGION_PAGES
        for r in pages.ranges()
        for page in range(r.offset // PAGE_BYTES, (r.offset + r.size) // PAGE_BYTES)
    }


class Model:
    """A guest page by page: for each page its live copy, whether the other is stale, and when."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[Copy, bool, int]] = {}
        self.deferred = self.reused = 0
        self.returns: Counter[tuple[int, int, bool]] = Counter()

    def convert(self, step: Step, now: int, counted: bool) -> None:
        """One conversion, as the plugin does it."""
        first, pages, private, deferred, region = step
        live = Copy.PRIVATE if private else Copy.SHARED
        for page in range(first, first + pages):
            number = page + (region - 1) * REGION_PAGES
            was, stale, since = self.pages.get(number, (live, False, now))
            if was is not live:
                self.reused += stale
                if counted:
                    self.returns[number, now - since, stale] += 1
            self.deferred += deferred
            self.pages[number] = (live, deferred, now)

    def stale(self, copy: Copy, since: int) -> set[int]:
        """Pages whose ``copy`` has been stale since then or longer."""
        return {
            page
            for page, (live, stale, time) in self.pages.items()
            if stale and live is copy.other and time <= since
        }


@settings(max_examples=300)
@given(conversions, st.integers(1, 9))
def test_mirror_follows_conversions(steps: list[Step], size: int) -> None:
    """In batches of any size it is what a page by page walk makes, to the byte and to the age."""
    ledger, model, returns = Ledger(1 << 30), Model(), Counter[int]()
    for now, start in enumerate(range(0, len(steps), size)):
        part = steps[start : start + size]
        before = model.deferred, model.reused
        for step in part:
            model.convert(step, now, counted=True)
        applied = ledger.apply(make_records(record(*step) for step in part), now)
        assert applied.deferred_bytes == (model.deferred - before[0]) * PAGE_BYTES
        assert applied.reused_bytes == (model.reused - before[1]) * PAGE_BYTES
        for row in ledger.returns():
            base = int(row["first"]) + (int(row["region"]) - 1) * REGION_PAGES
            returns.update(range(base, base + int(row["pages"])))
            # A run is as old as its first page.
            assert (base, int(row["away_ns"]), bool(row["kept"])) in model.returns
        for copy in Copy:
            assert page_numbers(ledger.stale(copy)) == model.stale(copy, now)
            for since in range(now + 1):
                assert page_numbers(ledger.older_than(copy, since)) == model.stale(copy, since)
            ages = {
                page: c.since_ns for c in ledger.cohorts(copy) for page in page_numbers(c.pages)
            }
            assert ages == {page: model.pages[page][2] for page in model.stale(copy, now)}
            assert ledger.oldest_ns(copy) == min(ages.values(), default=None)
    assert returns == Counter(page for page, _, _ in model.returns.elements())


@given(conversions, st.data())
def test_digests_follow_each_other(steps: list[Step], data: st.DataObject) -> None:
    """A batch that is digested in two pieces comes to the same as in one."""
    at = data.draw(st.integers(0, len(steps)))
    records = make_records(record(*step) for step in steps)
    whole, pieces = digest(records), digest(records[:at]).then(digest(records[at:]))
    assert (whole.first, whole.last, whole.entered) == (pieces.first, pieces.last, pieces.entered)
    assert (whole.deferred_bytes, whole.reused_bytes) == (
        pieces.deferred_bytes,
        pieces.reused_bytes,
    )
    assert whole.returns["pages"].sum() == pieces.returns["pages"].sum()


@given(conversions)
def test_overlap_is_cut_in_pieces(steps: list[Step]) -> None:
    """A batch of many overlaps is worked off in halves, and comes to the same."""
    records = make_records(record(*step) for step in steps)
    with pytest.MonkeyPatch.context() as patch:
        whole = digest(records)
        patch.setattr("qmp_upm.digest.OVERLAP_MOST", 1)
        halves = digest(records)
    assert (whole.first, whole.last, whole.entered) == (halves.first, halves.last, halves.entered)
    assert whole.reused_bytes == halves.reused_bytes


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 500)), min_size=200, max_size=300))
def test_joined_ages_err_little(steps: list[tuple[int, int]]) -> None:
    """Many batches make few layers, and no page counts as younger, or much older, than it is."""
    ledger, times, now = Ledger(1 << 40), dict[int, int](), 0
    for wait_ms, page in steps:
        now += wait_ms * 1_000_000
        ledger.apply(make_records([record(page, 1, private=True, deferred=True)]), now)
        times[page] = now
    cohorts = ledger.cohorts(Copy.SHARED)
    assert len(cohorts) <= LAYERS_MOST + 1
    for cohort in cohorts:
        for page in page_numbers(cohort.pages):
            assert 0 <= times[page] - cohort.since_ns <= (now - times[page]) / 3 + 1_000_000


def test_a_resynchronisation_without_news_changes_no_age() -> None:
    """What was read as it was known leaves no trace, however many batches are joined later."""
    told, untold = Ledger(1 << 40), Ledger(1 << 40)
    told.replace({copy: PageSet() for copy in Copy}, 0)
    for page in range(2 * LAYERS_MOST):
        became = make_records([record(page, 1, private=True, deferred=True)])
        for ledger in (told, untold):
            ledger.apply(became, (1000 + page) * NSEC)
    assert told.cohorts(Copy.SHARED) == untold.cohorts(Copy.SHARED)


def test_gone_regions_are_forgotten() -> None:
    """After a reset of the guest nothing of the old regions is left; others stay."""
    ledger = Ledger(1 << 30)
    for region in (1, 2):
        ledger.apply(make_records([record(0, 3, private=True, deferred=True, region=region)]), 5)
    assert ledger.oldest_ns(Copy.SHARED) == 5
    ledger.forget_regions_but({2})
    assert page_numbers(ledger.older_than(Copy.SHARED, 9)) == {1000, 1001, 1002}
    assert ledger.stale_bytes == 3 * PAGE_BYTES
    assert ledger._regions() == {2}


@given(st.sets(st.integers(0, 200)), st.sampled_from([0, 200]))
def test_page_set_gives_merged_runs(pages: set[int], few_pages: int) -> None:
    """Runs are disjoint, in order, not adjacent, and cover the set, be it small or large."""
    made = PageSet.of(*(Range(1, page * PAGE_BYTES, PAGE_BYTES) for page in pages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qmp_upm.pages.FEW_PAGES", few_pages)
        ranges = list(made.ranges())
    assert page_numbers(made) == pages
    assert all(a.offset + a.size < b.offset for a, b in pairwise(ranges))


def decide(policy: Policy, ledger: Ledger, now_s: float) -> Decision:
    """The decision at a time, without new conversions."""
    return policy.decide(Batch(), ledger, int(now_s * NSEC), Pressure())


def stale_ledger(pages: int, budget_pages: int) -> Ledger:
    """Pages became stale one after the other, a second apart, from time 0."""
    ledger = Ledger(budget_pages * PAGE_BYTES)
    for page in range(pages):
        became = record(2 * page, 1, private=True, deferred=True)
        ledger.apply(make_records([became]), page * NSEC)
    return ledger


@pytest.mark.parametrize(
    ("copies", "kept"),
    [("both", set()), ("none", set(Copy)), ("private", {Copy.SHARED}), ("shared", {Copy.PRIVATE})],
)
def test_eager_keeps_what_it_does_not_name(copies: str, kept: set[Copy]) -> None:
    """The four modes."""
    decision = decide(make_policy("eager", {"copies": copies}), Ledger(0), 0)
    assert (decision.defer, decision.discards) == (kept, ())


def test_lazy_discards_by_age() -> None:
    """What has been stale for max_age goes; the rest stays, and sets the alarm."""
    ledger = stale_ledger(3, 100)
    decision = decide(make_policy("lazy", {"max_age": "10 s"}), ledger, 11)
    assert [(d.reason, page_numbers(d.pages)) for d in decision.discards] == [("age", {0, 2})]


def test_lazy_keeps_the_watermarks() -> None:
    """Above the high one the oldest go, down to the low one."""
    ledger = stale_ledger(10, 10)
    decision = decide(make_policy("lazy", {"high": 0.9, "low": 0.5, "max_age": 60}), ledger, 10)
    assert [(d.reason, page_numbers(d.pages)) for d in decision.discards] == [
        ("budget", {0, 2, 4, 6, 8})
    ]


@pytest.mark.parametrize("name", ["lazy", "adaptive"])
@pytest.mark.parametrize("source", ["host_some_percent", "cgroup_some_percent"])
def test_pressure_gives_everything_back(name: str, source: str) -> None:
    """From the threshold on, of the host or of the cgroup, and until half of it is reached."""
    policy, ledger = make_policy(name, {"pressure": 10}), stale_ledger(3, 100)
    held = []
    for percent in (9.9, 10, 6, 4.9, 6):
        decision = policy.decide(Batch(), ledger, 4 * NSEC, Pressure(**{source: percent}))
        held.append((bool(decision.defer), [d.reason for d in decision.discards]))
    assert held == [
        (True, []),
        (False, ["pressure"]),
        (False, ["pressure"]),
        (True, []),
        (True, []),
    ]


def test_batched_flushes_by_bytes_and_by_delay() -> None:
    """Nothing before either is reached; everything then."""
    policy = make_policy("batched", {"max_bytes": 4 * PAGE_BYTES, "max_delay": 5})
    waiting = decide(policy, stale_ledger(3, 100), 3)
    assert (waiting.discards, waiting.wake_at_ns) == ((), 5 * NSEC)
    assert [d.reason for d in decide(policy, stale_ledger(4, 100), 3).discards] == ["bytes"]
    assert [d.reason for d in decide(policy, stale_ledger(1, 100), 5).discards] == ["delay"]


@pytest.mark.parametrize(
    ("name", "parameters", "hint"),
    [
        ("lasy", {}, "lazy"),
        ("lazy", {"max_agee": 1}, "max_age"),
        ("lazy", {"max_age": "1 day"}, "max_age"),
        ("lazy", {"low": 0.9, "high": 0.1}, "low"),
        ("batched", {"max_bytes": 0}, "max_bytes"),
        ("eager", {"copies": "all"}, "copies"),
    ],
)
def test_bad_policies_are_errors(name: str, parameters: dict[str, object], hint: str) -> None:
    """An unknown policy or parameter is never guessed at; the hint names what there is."""
    with pytest.raises(ConfigError) as caught:
        make_policy(name, parameters)
    assert hint in caught.value.hint


def test_memory_is_bounded_by_what_the_guest_converts() -> None:
    """However often a guest converts the same pages, its layers do not keep them all."""
    chance, window, now = random.Random(5), 1000, 0  # noqa: S311 - a test's chance is known
    ledger, sizes = Ledger(1 << 30), []
    for turn in range(6000):
        now += int(NSEC * chance.random() ** 3)
        count = chance.randint(1, 50)
        row = record(chance.randrange(window - count), count, turn % 2 == 0, deferred=True)
        ledger.apply(make_records([row]), now)
        sets = (pages for layer in ledger._layers for pages in layer.live.values())
        sizes.append(sum(pages.bytes for pages in sets))
    assert max(sizes) < 4 * window * PAGE_BYTES
