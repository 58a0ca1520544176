# SPDX-License-Identifier: GPL-2.0-or-later
"""The policy that learns: what it costs beside the optimum, and what it remembers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qmp_upm_policies.adaptive import Adaptive
from qmp_upm_policies.skirental import HEDGE, Bill, cheapest_hold

from qmp_upm.digest import RETURN, Returns
from qmp_upm.errors import ConfigError
from qmp_upm.history import BUCKETS, EDGES_S, FADE_ABOVE, ROWS_MOST, ReturnTimes, bucket_of
from qmp_upm.ledger import Ledger
from qmp_upm.pages import PAGE_BYTES, Range, Runs
from qmp_upm.policy import Batch, Decision, Policy, Pressure, make_policy
from qmp_upm.prices import Prices
from qmp_upm.protocol import Copy
from qmp_upm.records import make_records
from qmp_upm.simulator.compare import price
from qmp_upm.simulator.engine import replay
from qmp_upm.simulator.optimum import find_optimum
from qmp_upm.simulator.profiles import find_profile
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.simulator.workloads import make_workload
from qmp_upm.units import NSEC

PRICES = {"conversion": 0, "discard_call": 8e-6, "discard_page": 0, "refault_page": 0}


def cost(timeline: Timeline, prices: Prices) -> tuple[float, float]:
    """Seconds that ``adaptive`` pays on it, rent included, and that the optimum does."""
    outcome = replay(timeline, make_policy("adaptive", {"prices": prices}))
    account = outcome.account
    paid = prices.conversion * timeline.conversions
    paid += prices.discard_call * outcome.discards
    paid += prices.discard_page * outcome.discarded_bytes / PAGE_BYTES
    paid += prices.refault_page * account.refaulted_pages
    paid += prices.held_byte_second * PAGE_BYTES * account.page_ns / NSEC
    return paid, find_optimum(timeline, prices).cost_seconds


@pytest.mark.parametrize("profile", ["measured", "mail-2022", "free"])
@pytest.mark.parametrize("workload", ["ovmf", "ovmf-pool", "swiotlb", "accept", "balloon"])
def test_costs_little_more_than_the_optimum(workload: str, profile: str) -> None:
    """At most 1.1 times, where every guest is at its beginning and nothing is known of it."""
    paid, optimum = cost(make_workload(workload), find_profile(profile))
    assert paid <= 1.1 * optimum


def test_ovmf_runs_as_if_nothing_were_discarded() -> None:
    """It holds a tenth at most of what never discarding holds, and spends little more time."""
    timeline, prices = make_workload("ovmf"), find_profile("measured")
    held = [
        replay(timeline, make_policy(name, parameters))
        for name, parameters in (("adaptive", {"prices": prices}), ("eager", {"copies": "none"}))
    ]
    assert held[0].mean_stale_bytes <= 0.1 * held[1].mean_stale_bytes
    seconds = [
        prices.conversion * timeline.conversions
        + prices.discard_call * outcome.discards
        + prices.discard_page * outcome.discarded_bytes / PAGE_BYTES
        + prices.refault_page * outcome.account.refaulted_pages
        for outcome in held
    ]
    assert seconds[0] <= 1.02 * seconds[1]


def records_of(*rows: tuple[int, int, int, int]) -> np.ndarray:
    """Conversions of (first page, pages, private, milliseconds)."""
    return make_records(
        (1, first * PAGE_BYTES, pages * PAGE_BYTES, private, 1, ms * 1_000_000, 1)
        for first, pages, private, ms in rows
    )


def test_learns_what_comes_back_and_lets_the_rest_go() -> None:
    """A page that is back within a millisecond is held as long; one that isn't goes for good."""
    policy, ledger = make_policy("adaptive", {"prices": PRICES}), Ledger(1 << 40)
    for ms in range(0, 400, 4):
        records = records_of((0, 1, 0, ms), (0, 1, 1, ms + 1), (0, 1, 0, ms + 2))
        ledger.apply(records, (ms + 3) * 1_000_000)
        decision = policy.decide(Batch(records), ledger, (ms + 3) * 1_000_000, Pressure())
        assert not decision.discards
    assert decision.wake_at_ns is not None
    gone = 0
    while decision.wake_at_ns is not None:
        now_ns = decision.wake_at_ns
        decision = policy.decide(Batch(), ledger, now_ns, Pressure())
        for discard in decision.discards:
            gone += discard.pages.bytes
            ledger.remove(discard.copy, discard.pages)
    assert gone == PAGE_BYTES
    assert now_ns < 5 * NSEC  # D/r is 17 s here


def test_first_block_is_too_big_to_hold() -> None:
    """Until sizes are known it holds little, so that a bounce buffer goes in one punch."""
    first = make_policy("adaptive", {}).decide(Batch(), Ledger(1 << 40), 0, Pressure())
    assert first.defer == set(Copy)
    assert first.hold_bytes is not None
    assert first.hold_bytes < 64 << 20


def test_no_price_no_holding() -> None:
    """Where a discard costs nothing it is eager."""
    free = dict.fromkeys(PRICES, 0)
    decision = make_policy("adaptive", {"prices": free}).decide(
        Batch(), Ledger(1 << 40), 0, Pressure()
    )
    assert decision.defer == set()


def test_attached_again_waits_for_what_is_stale() -> None:
    """What was stale before this policy saw the VM is not forgotten."""
    policy, ledger = make_policy("adaptive", {"prices": PRICES}), Ledger(1 << 40)
    ledger.apply(records_of((0, 4, 1, 0)), 0)
    policy.attached(ledger, 0)
    decision: Decision = policy.decide(Batch(), ledger, 3600 * NSEC, Pressure())
    assert [discard.pages for discard in decision.discards] == [ledger.stale(Copy.SHARED)]


def until_empty(policy: Policy, ledger: Ledger, decision: Decision) -> list[str]:
    """The reasons of all discards until nothing is stale, each at the time asked for."""
    reasons = []
    while ledger.stale_bytes:
        for discard in decision.discards:
            reasons.append(discard.reason)
            ledger.remove(discard.copy, discard.pages)
        if ledger.stale_bytes:
            assert decision.wake_at_ns is not None
            decision = policy.decide(Batch(), ledger, decision.wake_at_ns, Pressure())
    return reasons


@pytest.mark.parametrize("back", [True, False])
def test_a_trial_that_comes_back_is_not_spent(*, back: bool) -> None:
    """The one shared copy that is held to learn: the next is, too, if that was worth it."""
    policy, ledger = make_policy("adaptive", {"prices": PRICES}), Ledger(1 << 40)
    rows = [(0, 1, 0, 2000)] if back else []
    for records, ms in (
        (records_of((0, 1, 1, 0)), 0),
        (records_of(*rows, (512, 1, 1, 2000)), 2000),
        (make_records(), 10_000),
    ):
        ledger.apply(records, ms * NSEC // 1000)
        decision = policy.decide(Batch(records), ledger, ms * NSEC // 1000, Pressure())
    gone = [(discard.copy, list(discard.pages.ranges())) for discard in decision.discards]
    assert gone == ([] if back else [(Copy.SHARED, [Range(1, 512 * PAGE_BYTES, PAGE_BYTES)])])


@pytest.mark.parametrize("lost", [False, True])
def test_takes_over_what_another_policy_holds(*, lost: bool) -> None:
    """Swapped in, or after the ledger was read anew, it plans for all that is stale."""
    policy, ledger = make_policy("adaptive", {"prices": PRICES}), Ledger(1 << 40)
    if lost:
        policy.decide(Batch(), ledger, 0, Pressure())
    ledger.apply(records_of((0, 4, 1, 0)), 0)
    if lost:
        policy.attached(ledger, 0)
    decision = policy.decide(Batch(), ledger, 0, Pressure())
    assert until_empty(policy, ledger, decision) == ["learnt"]


def test_what_is_stale_unseen_goes_by_age() -> None:
    """A resynchronisation may find what no batch told of."""
    parameters = {"prices": PRICES, "max_age": "60 s"}
    policy, ledger = make_policy("adaptive", parameters), Ledger(1 << 40)
    policy.decide(Batch(), ledger, 0, Pressure())
    ledger.apply(records_of((0, 4, 1, 0)), 0)
    decision = policy.decide(Batch(), ledger, 1, Pressure())
    assert decision.wake_at_ns == 60 * NSEC
    assert until_empty(policy, ledger, decision) == ["age"]


def test_budget_takes_the_oldest() -> None:
    """Above the high watermark it does not wait for what it has learnt."""
    policy, ledger = make_policy("adaptive", {"prices": PRICES}), Ledger(10 * PAGE_BYTES)
    policy.decide(Batch(), ledger, 0, Pressure())
    records = records_of((0, 10, 1, 0))
    ledger.apply(records, 0)
    decision = policy.decide(Batch(records), ledger, 1, Pressure())
    assert [(d.reason, d.pages.bytes) for d in decision.discards] == [("budget", 3 * PAGE_BYTES)]


def test_prices_come_from_a_file(tmp_path: Path) -> None:
    """A file of calibrate's form; one that isn't is an error that says which and what to do."""
    file = tmp_path / "prices.toml"
    file.write_text("[prices]\n" + "\n".join(f"{key} = {value}" for key, value in PRICES.items()))
    assert make_policy("adaptive", {"prices": str(file)}).parameters.prices.discard_call == 8e-6
    file.write_text("[prices]\nconversion = -1\n")
    with pytest.raises(ConfigError, match=r"prices\.toml.*prices\.conversion.*calibrate"):
        make_policy("adaptive", {"prices": str(file)})


@given(
    st.floats(1e-7, 1), st.floats(0, 1), st.floats(1e-9, 1e-3), st.floats(1e-4, 1e5), st.booleans()
)
def test_sure_hold_bounds_the_loss(
    drop: float, refault: float, rent: float, away: float, back: bool
) -> None:
    """For every time away: 1 + HEDGE if it is never back; else what letting go may lose."""
    full = drop + refault
    bill = Bill(*(np.array([value]) for value in (drop, full, rent)))
    hold = float(bill.sure_hold()[0])
    kept = away <= hold
    paid = rent * min(away, hold) + (0 if kept else full if back else drop)
    optimum = min(rent * away, full if back else drop)
    hedged = hold < HEDGE * drop / rent * 1.001
    worst = (1 + full / (HEDGE * drop)) if hedged else 1 + np.sqrt(full / drop)
    assert paid <= worst * optimum * (1 + 1e-9)
    if hedged and not back and away > drop / rent:
        assert paid <= (1 + HEDGE) * optimum * (1 + 1e-9)


@given(
    st.lists(st.floats(0, 50), min_size=BUCKETS, max_size=BUCKETS),
    st.floats(1e-6, 1e-2),
    st.floats(0, 1e-2),
)
def test_cheapest_hold_is_within_break_even(
    counts: list[float], drop: float, refault: float
) -> None:
    """Nothing is held for longer than its loss would cost."""
    bill = Bill(np.array([drop]), np.array([drop + refault]), np.array([1e-6]))
    assert cheapest_hold(np.array([counts]), bill)[0] <= (drop + refault) / 1e-6


def returns(granules: list[int], away_s: float) -> Returns:
    """One page came back to private in each granule."""
    rows = np.zeros(len(granules), dtype=RETURN)
    rows["region"], rows["first"], rows["pages"] = 1, np.array(granules, dtype=int) * 512, 1
    rows["private"], rows["weight"], rows["away_ns"] = 1, 1.0, int(away_s * NSEC)
    return rows


def rows_of(times: ReturnTimes, granules: list[int]) -> list[int]:
    """The row of each granule."""
    first = np.array(granules, dtype=np.int64) * 512
    ones = np.ones_like(first)
    return times.rows(Copy.PRIVATE, Runs(ones, first, ones)).tolist()


def test_memory_is_bounded_and_keeps_what_knows_most() -> None:
    """A guest that flips everywhere takes no more rows; what was seen often survives it."""
    times = ReturnTimes()
    for _ in range(10):
        times.learn(returns([7], 0.002))
    for start in range(100, 20 * ROWS_MOST, 1000):
        times.learn(returns(list(range(start, start + 1000)), 1.0))
    row = rows_of(times, [7])[0]
    assert times.counts.shape[0] == ROWS_MOST
    assert times.counts[row].sum() == 10
    assert times.counts[row][bucket_of(np.array([0.002]))[0]] == 10
    assert rows_of(times, [5, 10**6]) == [0, 0]


def test_old_times_fade() -> None:
    """A granule that has changed its ways is known by its new ones."""
    times = ReturnTimes()
    for away_s in (0.001, 1.0):
        for _ in range(4 * int(FADE_ABOVE)):
            times.learn(returns([3], away_s))
    counts = times.counts[rows_of(times, [3])[0]]
    assert counts.sum() <= FADE_ABOVE
    assert counts[0] < 0.1 * counts.sum()


@given(st.floats(1e-6, 1e5))
def test_buckets_hold_what_they_say(seconds: float) -> None:
    """Each duration is at most its bucket's upper end, unless there is no greater one."""
    bucket = int(bucket_of(np.array([seconds]))[0])
    assert seconds <= EDGES_S[bucket] * (1 + 1e-6) or bucket == BUCKETS - 1
    assert bucket == 0 or seconds > EDGES_S[bucket - 1] * (1 - 1e-6)


@pytest.mark.parametrize("workload", ["balloon", "hostile"])
def test_what_discards_are_measured_to_take_is_learnt(workload: str) -> None:
    """On a host whose discards cost a thousand times the default, nobody need have calibrated it.

    Told what the plugin measures, it costs about what it does with the host's own prices; without
    being told, many times that. Given prices are not touched.
    """
    prices, timeline = find_profile("mail-2022"), make_workload(workload, 0)

    def ratio(told: Prices | None, **parameters: object) -> float:
        outcome = replay(timeline, make_policy("adaptive", parameters), prices=told)
        run = price("", "", outcome, prices, find_optimum(timeline, prices))
        return run.ratio_to_optimum or 1.0

    calibrated = ratio(None, prices=prices)
    assert ratio(prices) < 1.2 * calibrated < 0.2 * ratio(None)
    assert ratio(prices, prices=prices) == calibrated


def test_regions_that_are_gone_are_forgotten() -> None:
    """A guest that resets for ever has new regions each time; nothing adds up, nor gets slower."""
    policy, ledger = make_policy("adaptive", {"prices": PRICES}), Ledger(1 << 40)
    policy.decide(Batch(), ledger, 0, Pressure())
    for region in range(1, 300):
        for turn in (0, 1, 0):
            records = make_records([(region, 0, PAGE_BYTES, turn, 1, 0, 1)])
            ledger.apply(records, region * NSEC)
            policy.decide(Batch(records), ledger, region * NSEC, Pressure())
        policy.forgotten(ledger.forget_regions_but({region + 1}))
    assert isinstance(policy, Adaptive)
    assert not policy._times._rows
    assert not policy._times.counts.any()
