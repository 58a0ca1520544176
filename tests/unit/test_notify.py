# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service manager is told, and how late the event loop was."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from qmp_upm.looplag import BOUNDS_SECONDS, PERIOD_SECONDS, LoopLag
from qmp_upm.notify import Notifier, notifier
from qmp_upm.units import NSEC


class Manager:
    """Plays systemd on a socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self._socket.setblocking(False)

    def heard(self) -> list[dict[str, str]]:
        """Each datagram since the last call."""
        messages = []
        while True:
            try:
                text = self._socket.recv(4096).decode()
            except BlockingIOError:
                return messages
            messages.append(dict(line.split("=", 1) for line in text.split("\n")))

    def close(self) -> None:
        """Gone."""
        self._socket.close()


Make = Callable[..., Notifier]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes notifiers, and closes them."""
    made: list[Notifier] = []

    def new(*args: Any, **kwargs: Any) -> Notifier:
        made.append(Notifier(*args, **kwargs))
        return made[-1]

    yield new
    for one in made:
        one.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """On either kind of socket."""
    path = str(tmp_path / "notify")
    made = Manager(path if request.param == "path" else f"@{path}")
    yield made
    made.close()


def test_start_reload_and_stop(make: Make, manager: Manager) -> None:
    """The three turns of a service of Type=notify-reload, in systemd's words."""
    said = make(manager.address, clock=lambda: 5_000_007_999)
    said.ready("2 VMs")
    said.reloading()
    said.ready("3 VMs")
    said.stopping()
    assert manager.heard() == [
        {"READY": "1", "STATUS": "2 VMs"},
        {"RELOADING": "1", "MONOTONIC_USEC": "5000007"},
        {"READY": "1", "STATUS": "3 VMs"},
        {"STOPPING": "1", "STATUS": "leaving the VMs"},
    ]


def test_only_a_healthy_loop_feeds_the_watchdog(make: Make, manager: Manager) -> None:
    """Three times in its time, however often the loop beats; never when the loop is far behind."""
    now = [0]
    said = make(manager.address, 9.0, clock=lambda: now[0])
    fed = []
    for second in range(12):
        now[0] = second * NSEC
        said.beat(5.0 if second >= 8 else 0.001, lambda: "the same")
        fed += [second for message in manager.heard() if "WATCHDOG" in message]
    assert fed == [0, 3, 6]


def test_status_is_said_when_it_changes(make: Make, manager: Manager) -> None:
    """Not again and again, watchdog or not."""
    now = [0]
    said = make(manager.address, clock=lambda: now[0])
    said.ready("a")
    for status in ("a", "a", "b", "b", "a"):
        now[0] += 60 * NSEC
        said.beat(0, lambda status=status: status)
    assert [message["STATUS"] for message in manager.heard()] == ["a", "b", "a"]


def test_nobody_to_tell(make: Make) -> None:
    """Outside of systemd nothing is sent, and nothing fails."""
    said = make(None)
    said.ready("x")
    said.beat(0, lambda: pytest.fail("nobody wants to know"))


def test_a_manager_that_is_gone_is_logged(make: Make, tmp_path: Path) -> None:
    """And the daemon goes on."""
    with structlog.testing.capture_logs() as logs:
        make(str(tmp_path / "nobody")).ready("x")
    assert [(line["event"], bool(line["hint"])) for line in logs] == [("notify-failed", True)]


def test_a_manager_that_does_not_read_holds_nobody_up(make: Make, manager: Manager) -> None:
    """Datagrams beyond its queue are dropped with a line in the log."""
    said = make(manager.address)
    with structlog.testing.capture_logs() as logs:
        while not logs:
            said.reloading()
    assert logs[0]["event"] == "notify-failed"


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_whose_watchdog_it_is(environment: dict[str, str], watchdog_s: float | None) -> None:
    """Only the one that is meant for this process."""
    assert Notifier.from_environment(environment, 7).watchdog_s == watchdog_s


def test_children_do_not_speak_for_us(monkeypatch: pytest.MonkeyPatch, manager: Manager) -> None:
    """The variables are gone once they have been read."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    said = notifier()
    assert notifier()._socket is None
    said.ready("x")
    assert len(manager.heard()) == 1
    said.close()


async def test_lag_is_what_the_timer_is_late() -> None:
    """Each look falls into the bucket of its lateness, and is passed on."""
    now, lags = [0.0], [0.0, 0.001, 0.0011, 0.3, 7.0]
    left = iter(lags)

    async def sleep(seconds: float) -> None:
        late = next(left, None)
        if late is None:
            raise asyncio.CancelledError
        now[0] += seconds + late

    measured = LoopLag(lambda: now[0], sleep)
    heard: list[float] = []
    with pytest.raises(asyncio.CancelledError):
        await measured.run(heard.append)
    assert heard == pytest.approx(lags)
    assert measured.total_seconds == pytest.approx(sum(lags))
    assert sum(measured.counts) == len(lags)
    assert measured.counts[-1] == 1
    assert measured.counts[BOUNDS_SECONDS.index(0.5)] == 1


async def test_a_blocked_loop_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that works without a pause makes the real timer late."""
    monkeypatch.setattr("qmp_upm.looplag.PERIOD_SECONDS", PERIOD_SECONDS / 100)
    measured = LoopLag()
    seen = asyncio.Event()
    task = asyncio.create_task(measured.run(lambda lag: seen.set() if lag > 0.02 else None))
    async with asyncio.timeout(20):
        while not seen.is_set():
            await asyncio.sleep(0)
            deadline = asyncio.get_running_loop().time() + 0.05
            while asyncio.get_running_loop().time() < deadline:
                pass
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert measured.total_seconds > 0.02
