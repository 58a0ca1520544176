# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said of memory that the plugin does not follow as it should."""

from pathlib import Path

import pytest

from qmp_upm.protocol import Query, Region, read_message
from qmp_upm.remarks import remarks
from qmp_upm.stats import State
from qmp_upm.testing import FakePlugin
from tests.unit.sessions import MIB, fake_vm, running, until


def region(number: int, backing: str, state: str = "followed") -> Region:
    """One with this number."""
    return Region(
        id=number,
        name=f"ram{number}",
        size=MIB,
        backing=backing,
        state=state,
        stale_private=0,
        stale_shared=0,
    )


@pytest.mark.parametrize("backing", ["memfd", "file", "anonymous", "hugetlb", "in-place"])
def test_nothing_of_what_is_followed(backing: str) -> None:
    """Memory that the plugin knows is no news."""
    assert remarks([region(1, backing)]) == ()


@pytest.mark.parametrize(
    ("backing", "state", "seen", "hint"),
    [
        ("unknown", "followed", "shared copies", "share=on"),
        ("memfd", "failing", "refuses to discard", "punch holes"),
        ("unknown", "failing", "refuses to discard", "punch holes"),
        ("memfd", "lost", "can't follow", "restart the VM"),
    ],
)
def test_one_of_what_is_not(backing: str, state: str, seen: str, hint: str) -> None:
    """Which memory, what is wrong, and what to do; a state comes before a backing."""
    [remark] = remarks([region(1, "memfd"), region(2, backing, state)])
    assert remark.seen.startswith("ram2: ")
    assert seen in remark.seen
    assert hint in remark.hint


def test_many_are_said_once() -> None:
    """A VM can't fill a screen, or the daemon, with regions."""
    many = [region(n, "unknown") for n in range(1, 400)]
    [remark] = remarks(many)
    assert remark.seen.startswith("ram1 and 398 more: ")


def test_a_plugin_that_does_not_say() -> None:
    """Release 0.1.0 had no states, and no launches: its regions are followed, its VMs run."""
    answer = FakePlugin({"ram": MIB})("x-upm-query", {})
    assert isinstance(answer, dict)
    del answer["launching"], answer["regions"][0]["state"]
    query = read_message(Query, answer)
    assert (query.launching, query.regions[0].state) == (False, "followed")


async def test_a_session_says_it_as_long_as_it_is_so(tmp_path: Path) -> None:
    """In the VM's view: from the plugin's answer on, and until another answer."""
    peer = fake_vm()
    peer.plugin.ledger.regions[1].backing = "unknown"
    async with peer.listening(tmp_path / "sock"), running(tmp_path, lease="0.1 s") as run:
        await until(lambda: run.session.state is State.ATTACHED)
        [remark] = run.session.view().remarks
        assert "ram" in remark.seen
        peer.plugin.ledger.regions[1].backing = "memfd"
        peer.plugin.worker.lease_deadline_ns = 1
        peer.plugin.worker.wake()
        await until(lambda: not run.session.view().remarks)
