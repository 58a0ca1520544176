# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin of release 0.1.0 in a VM that still runs, served by this daemon.

Real: the old binary's answers and events, word for word, as a stock QEMU 10.0.2 gave them while its
guest's memory converted, act by act (``golden/plugin-0.1.0.json``). Simulated: that it is asked.
"""

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qmp_upm import refresh
from qmp_upm.asks import Flush, SetBudget
from qmp_upm.events import HostEventName
from qmp_upm.protocol import Copy
from qmp_upm.stats import State
from qmp_upm.testing import FakeQemu, ReplyError
from tests.unit.sessions import MIB, PAGE, running, until

PLAY = Path(__file__).with_name("golden") / "plugin-0.1.0.json"
KEEP = {"name": "eager", "copies": "none"}


class Replayed(FakeQemu):
    """Answers as the old binary did in the act at hand: in order, and the last answer again.

    What it was not asked in that act it answers as in the last act in which it was.
    """

    def __init__(self) -> None:
        super().__init__(self._say)
        self._acts = deque(json.loads(PLAY.read_text(encoding="utf-8")))
        self._lines: dict[str, deque[dict[str, Any]]] = {}
        self.act = ""

    def next_act(self) -> None:
        """Go on; the events that begin it are told."""
        act = self._acts.popleft()
        self.act = act["act"]
        lines: dict[str, deque[dict[str, Any]]] = {}
        said: dict[str, Any] = {"events": []}
        for line in act["dialogue"]:
            if "event" in line:
                said["events"].append(line)
            else:
                said = line | {"events": []}
                lines.setdefault(_key(line["command"], line["arguments"]), deque()).append(said)
        self._lines |= lines
        self._tell([line for line in act["dialogue"][:1] if "event" in line])

    def _tell(self, events: list[dict[str, Any]]) -> None:
        for line in events:
            self.emit(line["event"], line["data"])

    def _say(self, command: str, arguments: Mapping[str, Any]) -> object:
        lines = self._lines.get(_key(command, arguments))
        if lines is None:
            raise ReplyError(f"{command} {arguments} was not asked in act {self.act!r}")
        line = lines[0] if len(lines) == 1 else lines.popleft()
        events, line["events"] = line["events"], []
        asyncio.get_running_loop().call_soon(self._tell, events)
        return line["return"]


def _key(command: str, arguments: Mapping[str, Any]) -> str:
    """Settings are answered alike, whatever they are."""
    return command if command == "x-upm-configure" else f"{command} {json.dumps(arguments)}"


async def test_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attached, followed, flushed, over its budget, given a smaller one, and left: as a new one."""
    monkeypatch.setattr(refresh, "REFRESH_SECONDS", 0.01)
    peer = Replayed()
    peer.next_act()
    settings = {"policy": KEEP, "budget": "1 MiB", "lease": "30 s"}
    async with peer.listening(tmp_path / "sock"):
        async with running(tmp_path, **settings) as run:
            stats = run.session.guest.stats
            await until(lambda: run.session.state is State.ATTACHED)
            assert run.session.view().plugin_version == "0.1.0"

            peer.next_act()
            await until(lambda: stats.followed_conversions == 5)
            await until(lambda: stats.plugin_counters.get("conversions-to-shared") == 2)
            assert stats.stale_bytes == {Copy.PRIVATE: 16 * PAGE, Copy.SHARED: 12 * PAGE}
            assert stats.reused_bytes == {Copy.PRIVATE: 8 * PAGE, Copy.SHARED: 20 * PAGE}

            peer.next_act()
            assert await run.session.ask(Flush(Copy.PRIVATE)) == 16 * PAGE
            assert stats.stale_bytes == {Copy.PRIVATE: 0, Copy.SHARED: 12 * PAGE}

            peer.next_act()
            await until(lambda: stats.followed_conversions == 8)
            await until(lambda: stats.plugin_counters["over-budget-bytes"] == 300 * PAGE)
            await until(lambda: HostEventName.BUDGET_REACHED in [name for name, _ in run.told])
            assert stats.stale_bytes == {Copy.PRIVATE: 0, Copy.SHARED: 212 * PAGE}
            assert stats.peak_stale_bytes == 212 * PAGE <= MIB

            peer.next_act()
            await run.session.ask(SetBudget(4 * PAGE))
            assert "superseded-bytes-shared" in run.session.view().stats.plugin_counters
            assert (run.session.state, peer.connections) == (State.ATTACHED, 1)
            peer.next_act()
        assert run.session.state is State.STOPPED
        assert stats.plugin_counters["failsafe-bytes-shared"] == 212 * PAGE
