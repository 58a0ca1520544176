# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the lab importable; last, so that the installed packages are the ones under test.

No test may depend on how fast the machine is at the moment: Hypothesis' deadline is off for all.
At the end of every test the daemon must have told the truth, and nothing may be left over.
"""

import asyncio
import gc
import inspect
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

sys.path.append(str(Path(__file__).parents[1]))
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _truth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sessions are proved, tracebacks counted, and files closed: see `tests.truth`.

    ``@pytest.mark.untrue(why)``: a VM of this test lies, so that its ledger is no standard.
    ``@pytest.mark.traceback``: this test provokes one.
    """
    from qmp_upm.testing import FakeVm  # noqa: PLC0415 - after the path is set
    from qmp_upm.vm import Session  # noqa: PLC0415
    from tests.truth import Truth, loop_errors, noting_logger  # noqa: PLC0415

    truth = Truth()
    with monkeypatch.context() as patch, loop_errors(truth.tracebacks.append):
        patch.setattr(FakeVm, "listening", truth.listening(FakeVm.listening))
        patch.setattr(Session, "run", truth.proved(Session.run))
        structlog.configure(wrapper_class=noting_logger(truth.tracebacks.append))
        if inspect.iscoroutinefunction(getattr(request, "function", None)):
            request.getfixturevalue("_nothing_left")
        yield
    structlog.reset_defaults()
    assert request.node.get_closest_marker("untrue") or not truth.wrong, truth.wrong
    expected = request.node.get_closest_marker("traceback") is not None
    assert bool(truth.tracebacks) == expected, truth.tracebacks


@pytest.fixture
async def _nothing_left() -> AsyncIterator[None]:
    """Tasks that a test has begun and files that it has opened are gone when it is over."""
    from tests.truth import open_files  # noqa: PLC0415 - after the path is set

    before = open_files()
    yield
    async with asyncio.timeout(5):
        while asyncio.all_tasks() - {asyncio.current_task()}:  # noqa: ASYNC110 - of anybody's
            await asyncio.sleep(0.001)
    gc.collect()
    assert open_files() <= before
