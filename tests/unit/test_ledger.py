# SPDX-License-Identifier: GPL-2.0-or-later
"""The mirror of the plugin's ledger, and the policies on it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_upm.errors import ConfigError
from qmp_upm.ledger import Ledger
from qmp_upm.pages import PAGE_BYTES, PageSet, Range
from qmp_upm.policy import Batch, Decision, Policy, Pressure, make_policy
from qmp_upm.protocol import Copy
from qmp_upm.records import Record, make_records
from qmp_upm.units import NSEC

conversions = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 20), st.booleans(), st.booleans()), max_size=40
)


def record(first: int, pages: int, private: bool, deferred: bool) -> Record:
    """A conversion in region 1."""
    return Record(1, first * PAGE_BYTES, pages * PAGE_BYTES, int(private), int(deferred), 0, 1)


def page_numbers(pages: PageSet) -> set[int]:
    """The pages one by one."""
    return {
        page
        for r in pages.ranges()
        for page in range(r.offset // PAGE_BYTES, (r.offset + r.size) // PAGE_BYTES)
    }


@given(conversions, st.integers(1, 7))
def test_mirror_follows_conversions(steps: list[tuple[int, int, bool, bool]], size: int) -> None:
    """In batches of any size it is what a set of pages would be, and each page has an age."""
    ledger, model = Ledger(1 << 30), {copy: set[int]() for copy in Copy}
    records = [record(*step) for step in steps]
    for start in range(0, len(records), size):
        ledger.apply(make_records(records[start : start + size]), start)
    for first, pages, private, deferred in steps:
        live = Copy.PRIVATE if private else Copy.SHARED
        span = set(range(first, first + pages))
        model[live] -= span
        model[live.other] = model[live.other] | span if deferred else model[live.other] - span
    for copy in Copy:
        assert page_numbers(ledger.stale(copy)) == model[copy]
        assert page_numbers(ledger.older_than(copy, 1000)) == model[copy]


@given(st.sets(st.integers(0, 200)))
def test_page_set_gives_merged_runs(pages: set[int]) -> None:
    """Runs are disjoint, in order, not adjacent, and cover the set."""
    made = PageSet.of(*(Range(3, page * PAGE_BYTES, PAGE_BYTES) for page in pages))
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
