# SPDX-License-Identifier: GPL-2.0-or-later
"""What must be true at the end of every test: the daemon's picture of a VM is the plugin's ledger.

`proved` replaces `Session.run`, so that no test can make a session that is not looked at. When a
session that serves a fake VM is cancelled, it goes on until its mirror equals the fake plugin's
ledger, page by page and region by region, and its figures the plugin's; if that does not come
about, the test has failed. The look itself changes nothing: what the session has planned for
later, the renewal of the lease and the refresh of the counters, is brought forward, and nothing
else.

The same file says which tracebacks were logged, and which tasks and files were left over.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import structlog

from qmp_upm.pages import PageSet
from qmp_upm.protocol import Copy
from qmp_upm.stats import State
from qmp_upm.testing import FakePlugin, FakeVm
from qmp_upm.vm import Session

SETTLE_SECONDS = 3.0
"""How long a session may take, by its loop's clock: less than the daemon has to leave its VMs."""
LOOK_SECONDS = 0.005
UNSTEADY = frozenset({"commands", "events"})
"""Counters that grow when one looks at them."""


class Truth:
    """What was found to be wrong in one test. ``vms``: the fake VMs by socket."""

    def __init__(self) -> None:
        self.vms: dict[str, FakeVm] = {}
        self.wrong: list[str] = []
        self.tracebacks: list[str] = []

    def listening(
        self, listen: Callable[[FakeVm, str | Path], Any]
    ) -> Callable[[FakeVm, str | Path], Any]:
        """``FakeVm.listening`` that notes where each one listens."""

        @contextlib.asynccontextmanager
        async def noted(vm: FakeVm, path: str | Path) -> AsyncIterator[FakeVm]:
            self.vms[str(path)] = vm
            async with listen(vm, path):
                yield vm

        return noted

    def proved(
        self, run: Callable[[Session], Awaitable[None]]
    ) -> Callable[[Session], Awaitable[None]]:
        """``Session.run`` that is looked at before it is cancelled."""

        async def looked_at(session: Session) -> None:
            task = asyncio.ensure_future(run(session))
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                with contextlib.suppress(asyncio.CancelledError):
                    await self._settle(session)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise

        return looked_at

    async def _settle(self, session: Session) -> None:
        """Wait until all is true of it, or note what is not."""
        clock = asyncio.get_running_loop().time
        until_s = clock() + SETTLE_SECONDS
        while wrong := self._differences(session):
            if clock() > until_s:
                self.wrong.append(f"{session.name}: {'; '.join(wrong)}")
                return
            _hasten(session)
            await asyncio.sleep(LOOK_SECONDS)

    def _differences(self, session: Session) -> list[str]:
        vm = self.vms.get(session.socket)
        if vm is not None and session.state is State.ATTACHED:
            return differences(session, vm.plugin)
        held = session.guest.stats.stale_bytes
        over = session.held_until_ns < session._clock.monotonic_ns()
        if over and session.state is not State.SILENT and any(held.values()):
            return [f"{session.state}, its lease is over, and it is said to hold {held}"]
        return []


def differences(session: Session, plugin: FakePlugin) -> list[str]:
    """What the daemon believes of an attached VM, and is not so."""
    guest, ledger, serving = session.guest, plugin.ledger, session._serving
    wrong = []
    for copy in Copy:
        there = PageSet({region.id: region.stale[copy] for region in ledger.regions.values()})
        mirror = guest.ledger.stale(copy)
        if mirror != there:
            more, less = mirror.copy(), there.copy()
            more -= there
            less -= mirror
            wrong.append(f"{copy}: {more.bytes} bytes too many, {less.bytes} missing")
        if session.view().stale_bytes[copy] != ledger.stale(copy):
            wrong.append(f"{copy}: shown {session.view().stale_bytes}, is {ledger.stale(copy)}")
    if gone := guest.ledger._regions() - ledger.regions.keys():
        wrong.append(f"regions {gone} are gone")
    counted = {name: value for name, value in ledger.counters.items() if name not in UNSTEADY}
    known = {name: guest.totals._counters.get(name) for name in counted}
    if known != counted:
        named = {n: (known[n], counted[n]) for n in counted if known[n] != counted[n]}
        wrong.append(f"counters, known and true: {named}")
    if serving is not None and serving._backend.deferred is not None:
        deferring = {copy for copy in Copy if ledger.deferring[copy]}
        if serving._backend.deferred != deferring:
            wrong.append(f"defers {deferring}, told {set(serving._backend.deferred)}")
        hold = serving._backend.hold_bytes
        budget = guest.budget_bytes if hold is None else min(hold, guest.budget_bytes)
        if budget != ledger.budget:
            wrong.append(f"budget {ledger.budget}, told {budget}")
    return wrong


def _hasten(session: Session) -> None:
    """What it has planned, now."""
    serving = session._serving
    if serving is not None and session.state is State.ATTACHED:
        now_ns = session._clock.monotonic_ns()
        refresh = serving._refresh
        if refresh.due_ns is not None:
            refresh.due_ns = min(now_ns, refresh.due_ns)
        refresh.patience_ns = min(now_ns, refresh.patience_ns)
        serving._renew_ns = min(now_ns, serving._renew_ns)
        serving.wake()


def noting_logger(note: Callable[[str], None]) -> type:
    """A logger's class that tells of each traceback that it is given."""
    filtering: Any = structlog.make_filtering_bound_logger(logging.NOTSET)

    class Noting(filtering):  # type: ignore[misc] # made at run time
        def exception(self, event: str, *args: Any, **kw: Any) -> Any:
            note(event)
            return super().exception(event, *args, **kw)

    return Noting


class LoopErrors(logging.Handler):
    """What the event loop says: an exception that nobody retrieved, a callback that raised."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        """Tell of it."""
        self._note(record.getMessage())


@contextlib.contextmanager
def loop_errors(note: Callable[[str], None]) -> Iterator[None]:
    """Listen to the event loop's log."""
    handler = LoopErrors(note)
    logging.getLogger("asyncio").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("asyncio").removeHandler(handler)


def open_files() -> set[str]:
    """What this process has open: number and kind, or path."""
    folder, found = "/proc/self/fd", set()
    for number in os.listdir(folder):  # noqa: PTH208 - a Path for each is not needed
        with contextlib.suppress(OSError):
            found.add(f"{number} {os.readlink(f'{folder}/{number}')}")  # noqa: PTH115
    return {one for one in found if folder not in one and "/proc/" not in one}
