# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a policy may take: processor time if it works, real time if it sleeps."""

import signal
import time
from collections.abc import Callable

import pytest

from qmp_upm import contained
from qmp_upm.clock import Clock
from qmp_upm.contained import ContainedPolicy
from qmp_upm.ledger import Ledger
from qmp_upm.policy import Batch, Decision, LedgerView, Parameters, Policy, Pressure
from qmp_upm.stats import VmStats

TICK_S = 0.005


class Doing(Policy):
    """Does something before it decides."""

    def __init__(self, what: Callable[[], None]) -> None:
        super().__init__(Parameters())
        self.what = what

    def decide(
        self,
        batch: Batch,  # noqa: ARG002 - the contract gives every policy the same arguments
        ledger: LedgerView,  # noqa: ARG002 - the same
        now_ns: int,  # noqa: ARG002 - the same
        pressure: Pressure,  # noqa: ARG002 - the same
    ) -> Decision:
        """To keep nothing."""
        self.what()
        return Decision()


def fallen_back(what: Callable[[], None], patch: pytest.MonkeyPatch, **limits: float) -> str | None:
    """Why a policy that does this is no longer asked, under these limits."""
    patch.setattr(contained, "TICK_SECONDS", TICK_S)
    for name, value in limits.items():
        patch.setattr(contained, name, value)
    policy = ContainedPolicy(lambda: Doing(what), VmStats(), Clock())
    policy.decide(Batch(), Ledger(0), 0, Pressure())
    return policy.fallen_back


def spin() -> None:
    """For ever."""
    while True:
        pass


def sleep() -> None:
    """Longer than any test."""
    time.sleep(3600)


def wait_unrun() -> None:
    """As one that the system doesn't run for twenty ticks: it is told of them once, afterwards."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(20 * TICK_S)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def test_work_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor time that it takes."""
    assert fallen_back(spin, monkeypatch, DECIDE_SECONDS=0.02, TICKS_MOST=1 << 40)


def test_sleep_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no processor time, and stops all VMs just the same."""
    assert fallen_back(sleep, monkeypatch, DECIDE_SECONDS=1e9, TICKS_MOST=4)


def test_time_without_a_processor_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is too busy to run the daemon, its policies are not to blame."""
    assert fallen_back(wait_unrun, monkeypatch, TICKS_MOST=10) is None
