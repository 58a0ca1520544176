# SPDX-License-Identifier: GPL-2.0-or-later
"""A policy in its place: whatever it raises, returns or takes hurts its own VM only.

A policy is anybody's code and runs in the event loop of all VMs. One that can't be made, raises,
returns what is no decision, or does not return is replaced by ``eager`` for its VM, and the reason
kept. The same goes for it in the simulator, with virtual time for the clock.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from qmp_upm.clock import Clock
from qmp_upm.errors import PolicyError, QmpUpmError
from qmp_upm.ledger import Ledger
from qmp_upm.policy import Batch, Decision, Measured, Policy, Pressure, checked
from qmp_upm.stats import VmStats
from qmp_upm.units import NSEC

DECIDE_SECONDS = 1.0
"""The most processor time that a decision may take; it should take a thousandth of that."""
TICK_SECONDS = 0.1
"""How often, in real time, a policy that has not decided yet is looked at."""
TICKS_MOST = 30
"""The most ticks that a decision may live through, working or asleep.

They are no measure of time to a daemon that isn't let run: however many it misses, it gets one.
"""
AGAIN_NS = NSEC // 100
"""The least time until a policy is asked again because it wished so: each time costs a read."""

REASON_CHARACTERS = 1024
"""What is kept of an exception's text."""

# What anybody's code may raise: sys.exit() in a policy is no reason to end the daemon.
_ANY = (Exception, SystemExit)

Result = TypeVar("Result")


class ContainedPolicy:
    """The policy of one VM. ``fallen_back``: why it no longer decides, or never did."""

    def __init__(self, make: Callable[[], Policy], stats: VmStats, clock: Clock) -> None:
        self.fallen_back: str | None = None
        self.wake_at_ns: int | None = None
        self.stats = stats
        self._clock = clock
        self._policy: Policy | None = None
        try:
            with _time_limit():
                self._policy = make()
        except _ANY as error:
            self._fail(error)

    def swap(self, name: str, make: Callable[[], Policy]) -> None:
        """Another policy from now on, which may ask the one before for what it has learnt.

        PolicyError, with ``name``, if it can't be made or take over: the old one stays.
        """
        try:
            with _time_limit():
                policy = make()
                if self._policy is not None:
                    policy.swapped(self._policy)
        except _ANY as error:
            raise PolicyError(
                f"the policy {name!r} can't take over: {_reason(error)}",
                hint="tell the policy's author; the one before goes on",
            ) from error
        self._policy = policy
        self.fallen_back = self.wake_at_ns = None

    def replace(self, name: str, make: Callable[[], Policy]) -> None:
        """The same where the one before must not go on: ``eager`` if the new one can't."""
        try:
            self.swap(name, make)
        except PolicyError as error:
            self.wake_at_ns = None
            self._fail(error)

    def attached(self, ledger: Ledger) -> None:
        """The ledger has been read."""
        self._call(lambda policy: policy.attached(ledger, self._clock.monotonic_ns()))

    def measured(self, discards: Measured) -> None:
        """What discards have taken."""
        self._call(lambda policy: policy.measured(discards))

    def forgotten(self, regions: frozenset[int]) -> None:
        """Regions are gone."""
        self._call(lambda policy: policy.forgotten(regions))

    def detached(self) -> None:
        """The VM is gone, or is left."""
        self._call(lambda policy: policy.detached())

    def decide(self, batch: Batch, ledger: Ledger, now_ns: int, pressure: Pressure) -> Decision:
        """Its decision; ``eager`` once it has failed. The plugin itself drains what that keeps."""
        begun_ns = self._clock.monotonic_ns()
        decision = self._call(
            lambda policy: checked(policy.decide(batch, ledger, now_ns, pressure))
        )
        self.stats.count_decision(self._clock.monotonic_ns() - begun_ns)
        wake_ns = decision.wake_at_ns if decision else None
        self.wake_at_ns = None if wake_ns is None else max(wake_ns, now_ns + AGAIN_NS)
        return decision or Decision()

    def _call(self, what: Callable[[Policy], Result]) -> Result | None:
        """What it returns; None if the policy has failed, now or before."""
        if self._policy is None or self.fallen_back is not None:
            return None
        try:
            with _time_limit():
                return what(self._policy)
        except _ANY as error:
            self._fail(error)
        return None

    def _fail(self, error: BaseException) -> None:
        self.stats.decision_failures += 1
        self.fallen_back = _reason(error)


def _reason(error: BaseException) -> str:
    """What a third party's exception says; its own text may raise, too."""
    if isinstance(error, QmpUpmError):
        return error.message
    try:
        return repr(error)[:REASON_CHARACTERS]
    except _ANY:
        return type(error).__name__


@contextmanager
def _time_limit() -> Iterator[None]:
    """PolicyError in what takes longer than DECIDE_SECONDS, or lives through TICKS_MOST.

    Only Python's main thread can be interrupted, and only between two of its instructions.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over, ticks, begun = False, 0, time.thread_time()

    def tick(_number: int, _frame: FrameType | None) -> None:
        nonlocal ticks
        ticks += 1
        late = ticks >= TICKS_MOST or time.thread_time() - begun >= DECIDE_SECONDS
        if late and not over:
            raise PolicyError("the policy did not decide in time", hint="tell the policy's author")

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)
    try:
        try:
            yield
        finally:
            over = True  # a tick from here on would hit the event loop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
