# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's budget, divided over its VMs.

The rule: each attached VM gets its part by weight, but no more than its own budget; what that
leaves over goes to the others by the same rule. So the parts never add up to more than the whole,
and a VM that is idle keeps its part: what others do does not change it.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from qmp_upm.asks import SetShare
from qmp_upm.clock import Clock
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.stats import State
from qmp_upm.vm import Session

ASK_SECONDS = 5.0
"""How long others wait for a VM that goes down to a smaller part. Its answer counts whenever it
comes; until then it counts with its old part."""
AGAIN_SECONDS = 1.0
"""Until it is tried again, while a VM holds what it should not."""

Name = TypeVar("Name")


@dataclass(frozen=True)
class Claim:
    """A VM's weight, and the most that it may have in any case."""

    weight: int
    most_bytes: int


def divide(total_bytes: int, claims: Mapping[Name, Claim]) -> dict[Name, int]:
    """Each one's part, in whole pages; together at most ``total_bytes``."""
    parts: dict[Name, int] = {}
    left_bytes = max(0, total_bytes)
    left_weight = sum(claim.weight for claim in claims.values())
    # Those that their own budget holds below their part come first, and leave the rest more.
    for name, claim in sorted(claims.items(), key=lambda item: item[1].most_bytes / item[1].weight):
        part = min(claim.most_bytes, left_bytes * claim.weight // left_weight)
        parts[name] = part // PAGE_BYTES * PAGE_BYTES
        left_bytes -= parts[name]
        left_weight -= claim.weight
    return parts


class Balancer:
    """Keeps the parts of the host's budget right while VMs come and go.

    A part is first taken from those that get less, then given to those that get more. A VM that was
    lost counts with what it had until its lease has run out, one that does not go down with its
    old part until it has; one that is asked and does not answer is not asked again meanwhile, and
    nobody waits for it twice. It answers, or its session ends: no command takes for ever.
    """

    def __init__(
        self,
        sessions: Callable[[], Iterable[Session]],
        total_bytes: Callable[[], int | None],
        clock: Clock,
        default: Callable[[], Claim],
    ) -> None:
        self._sessions = sessions
        self._total_bytes = total_bytes
        self._clock = clock
        self._default = default
        self._wanted = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._late: dict[Session, int] = {}
        self._asked: dict[Session, _Asked] = {}

    def want(self) -> None:
        """Something has changed that the parts depend on."""
        self._wanted.set()

    async def divide_anew(self, seconds: float) -> None:
        """Have it done now, and wait for it so long at most."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self.want()
        await asyncio.wait((done,), timeout=seconds)

    async def run(self) -> None:
        """Divide anew whenever it is wanted, until cancelled."""
        while True:
            waiting, self._waiting = self._waiting, []
            settled = await self.balance()
            for done in waiting:
                done.set_result(None)
            try:
                async with asyncio.timeout(None if settled else AGAIN_SECONDS):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()

    async def balance(self) -> bool:
        """Divide now. False if that is not the end of it: a VM holds more than its part, or may."""
        self._hear_late_answers()
        total_bytes = self._total_bytes()
        sessions = list(self._sessions())
        if total_bytes is None:
            self._late.clear()
            await self._ask({s: None for s in sessions if s.guest.share is not None})
            return True
        attached = [s for s in sessions if s.state is State.ATTACHED]
        lost_bytes = sum(self._hold(s) for s in sessions if s not in attached)
        self._late = {s: held for s, held in self._late.items() if s in attached}
        while True:
            left_bytes = total_bytes - lost_bytes - sum(self._late.values())
            parts = _divide(left_bytes, attached, self._default())
            may = {s: self._may_hold(s) for s in parts}
            less = {s: part for s, part in parts.items() if part < may[s] or s in self._late}
            before = {s: self._late.get(s, may[s]) for s in less}
            held = await self._ask(less)
            late = {s: before[s] for s, part in less.items() if held.get(s, part + 1) > part}
            settled = late.keys() <= self._late.keys()
            self._late = late
            if settled:
                break
        more = {s: part for s, part in parts.items() if s not in late and part != s.guest.share}
        await self._ask(more)
        return not late and not lost_bytes

    def _hold(self, session: Session) -> int:
        """What a VM that is not attached may still hold; it begins with nothing once that is 0."""
        if session.held_until_ns > self._clock.monotonic_ns():
            return self._may_hold(session)
        session.guest.share = 0
        return 0

    def _may_hold(self, session: Session) -> int:
        """What it has, or is about to have."""
        asked = self._asked.get(session)
        return max(session.guest.budget_bytes, asked.part_bytes if asked else 0)

    def _hear_late_answers(self) -> None:
        """Who has gone down to a smaller part by now counts with it."""
        for session, asked in list(self._asked.items()):
            if asked.done.done():
                del self._asked[session]
                if (held := _answer(asked.done)) is not None and held <= asked.part_bytes:
                    self._late.pop(session, None)

    async def _ask(self, parts: Mapping[Session, int | None]) -> dict[Session, int]:
        """Set parts; returns what each VM held then. Those that have not done it are not in it."""
        now = {
            session: _Asked(
                session.ask(SetShare(part)),
                session.guest.own_budget_bytes if part is None else part,
            )
            for session, part in parts.items()
            if session not in self._asked
        }
        if now:
            await asyncio.wait([asked.done for asked in now.values()], timeout=ASK_SECONDS)
        held = {}
        for session, asked in now.items():
            if not asked.done.done():
                self._asked[session] = asked
                asked.done.add_done_callback(lambda _: self.want())
            elif (answer := _answer(asked.done)) is not None:
                held[session] = answer
        return held


@dataclass(frozen=True)
class _Asked:
    """A part that a VM was asked to take, and that it may have taken already."""

    done: asyncio.Future[int]
    part_bytes: int


def _answer(done: asyncio.Future[int]) -> int | None:
    """What it held; None if it did not do it: its session's state says why."""
    return None if done.cancelled() or done.exception() is not None else done.result()


def _divide(total_bytes: int, sessions: Iterable[Session], default: Claim) -> dict[Session, int]:
    """Parts by weight. Those of one user without a process to tell them apart have one, together.

    Otherwise a QEMU in a container could open sockets until all others' parts are nothing.
    """
    claims = {s: Claim(s.guest.settings.weight, s.guest.own_budget_bytes) for s in sessions}
    nobody: dict[int, dict[Session, Claim]] = defaultdict(dict)
    for session in [s for s in claims if s.served.process <= 0]:
        nobody[session.served.user][session] = claims.pop(session)
    parts = divide(total_bytes, {**claims, **dict.fromkeys(nobody, default)})
    shared = {user: divide(parts.pop(user), own) for user, own in nobody.items()}
    return parts | {s: part for own in shared.values() for s, part in own.items()}
