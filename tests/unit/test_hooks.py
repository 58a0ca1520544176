# SPDX-License-Identifier: GPL-2.0-or-later
"""What is overridden in `qemu.qmp` is still called, by its code and in a real conversation."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from qmp_upm.errors import InstallError
from qmp_upm.hooks import HOOKS, check_hooks
from qmp_upm.qmp import BoundedClient, EventQueue, Monitor, _QemuClient
from tests.unit.sessions import fake_vm, until


def test_a_library_that_calls_something_else_is_refused() -> None:
    """By name, with the release to install."""
    check_hooks()
    with pytest.raises(InstallError, match="_read_a_line") as caught:
        check_hooks({**HOOKS, "_read_a_line": QMPClient.__mro__})
    assert "qemu.qmp==" in caught.value.hint


async def test_each_override_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a session with a peer that greets, answers, tells an event and hangs up."""
    called: Counter[str] = Counter()
    overridden = [
        (_QemuClient, "_readline"),
        (_QemuClient, "_on_message"),
        (BoundedClient, "_on_message"),
        (BoundedClient, "_cb_inbound"),
        (BoundedClient, "_cb_outbound"),
        (BoundedClient, "_bh_disconnect"),
        (EventQueue, "put"),
    ]

    def counting(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def call(*arguments: Any) -> Any:
            called[f"{kind.__name__}.{name}"] += 1
            return original(*arguments)

        monkeypatch.setattr(kind, name, call)

    for kind, name in overridden:
        counting(kind, name)
    async with fake_vm().listening(tmp_path / "sock") as peer:
        monitor = Monitor(str(tmp_path / "sock"))
        await monitor.connect()
        await monitor.execute("query-name")
        peer.emit("X_UPM_CONVERSIONS", {})
        await until(lambda: called["EventQueue.put"])
        await peer.hang_up()
        await until(lambda: called["BoundedClient._bh_disconnect"])
        await monitor.close()
    assert set(called) == {f"{kind.__name__}.{name}" for kind, name in overridden}


async def test_late_answers_are_charged(tmp_path: Path) -> None:
    """The library's table of open commands is what tells a late answer from one that is awaited."""
    async with fake_vm().listening(tmp_path / "sock"):
        monitor = Monitor(str(tmp_path / "sock"))
        await monitor.connect()
        left = monitor._client._messages._left
        await monitor.execute("query-name")
        assert monitor._client._messages._left == left
        await monitor.close()
