# SPDX-License-Identifier: GPL-2.0-or-later
"""How sure an advice is: from windows of known costs, and from traces with a plain answer."""

import numpy as np
import pytest

from qmp_upm.pages import PAGE_BYTES
from qmp_upm.prices import Prices
from qmp_upm.records import make_records
from qmp_upm.simulator import advice
from qmp_upm.simulator.advice import Support, advise
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.units import NSEC

MSEC = NSEC // 1000
PRICES = Prices(conversion=1e-6, discard_call=5e-6, discard_page=1e-6, refault_page=2e-6)


def rng() -> np.random.Generator:
    """The same draws each time."""
    return np.random.default_rng(3)


def test_a_hot_page_is_kept() -> None:
    """Discards cost, memory hardly: surely not eager, and it saves what eager discards cost."""
    rows = [(1, 0, PAGE_BYTES, i % 2, 0, i * MSEC, 1) for i in range(600)]
    advised = advise(Timeline(make_records(rows)), "p", PRICES, rng())
    assert advised.best.name != "eager"
    assert advised.saved_seconds == pytest.approx(600 * 6e-6 + 599 * 2e-6, rel=0.1)
    assert advised.support.prices == 1
    assert advised.run.cost_seconds == min(run.cost_seconds for run in advised.candidates)


def test_a_short_trace_is_never_sure() -> None:
    """Whatever its few windows say."""
    rows = [(1, i * PAGE_BYTES, PAGE_BYTES, 0, 0, i * MSEC, 1) for i in range(3)]
    advised = advise(Timeline(make_records(rows)), "p", PRICES, rng())
    assert (advised.support.windows, advised.support.verdict) == (3, "unsure")


def test_bootstrap_counts_draws_that_agree() -> None:
    """Equal windows always agree; a policy that lives on one window of many seldom does."""
    even = np.array([[1.0, 2.0]] * 12)
    assert advice._bootstrap(even, 0, rng()) == 1
    odd = np.array([[1.0, 1.1]] * 11 + [[3.0, 1.0]])
    assert 0 < advice._bootstrap(odd, 0, rng()) < 0.5


def test_halves_show_what_wrong_advice_costs() -> None:
    """Windows that take turns in what they favour."""
    assert advice._halves(np.array([[1.0, 2.0]] * 12)) == 1
    assert advice._halves(np.array([[1.0, 2.0], [2.0, 1.0]] * 6)) == 2


@pytest.mark.parametrize(
    ("support", "verdict"),
    [
        (Support(0.95, 1.0, 0.95, 12), "sure"),
        (Support(0.95, 1.2, 0.95, 12), "likely"),
        (Support(0.7, 1.0, 0.95, 12), "likely"),
        (Support(0.95, 1.0, 0.5, 12), "unsure"),
        (Support(1.0, 1.0, 1.0, 11), "unsure"),
    ],
)
def test_verdicts(support: Support, verdict: str) -> None:
    """All three must agree to be sure."""
    assert support.verdict == verdict
