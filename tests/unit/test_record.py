# SPDX-License-Identifier: GPL-2.0-or-later
"""``qmp-upm record`` against a control socket: the file is whole, however the recording ends."""

import asyncio
import resource
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from qmp_upm.connection import Limits
from qmp_upm.control import ControlServer
from qmp_upm.errors import UnknownVmError
from qmp_upm.events import HostEvent, Publisher, Subscription
from qmp_upm.protocol import Copy
from qmp_upm.recording import BOUNDS
from qmp_upm.records import RECORD
from qmp_upm.stats import State, VmStats, VmView
from qmp_upm.trace import Block, Trace, read_trace

PROGRAM = Path(sys.executable).with_name("qmp-upm")
SIGNED = [signal.SIGINT, signal.SIGTERM]


class OneVm:
    """A host with the VM ``db``, whose conversions the test makes."""

    def __init__(self) -> None:
        self.batches: Publisher[Block] = Publisher(BOUNDS)
        self.events: Publisher[HostEvent] = Publisher()
        self.sent = 0

    def vm(self, name: str) -> VmView:
        """Only that one."""
        if name != "db":
            raise UnknownVmError(f"there is no VM {name!r}", hint="known: db")
        return VmView(
            name="db",
            uuid=None,
            socket="/run/db.monitor",
            state=State.ATTACHED,
            since=0,
            trouble=None,
            qemu_version="10.0.2",
            plugin_version="0.1.0",
            vm_kind="tdx",
            policy="lazy",
            parameters={"max_age": 3.0},
            fallen_back=None,
            budget_bytes=1 << 20,
            stale_bytes=dict.fromkeys(Copy, 0),
            stats=VmStats(),
        )

    def subscribe(self) -> Subscription[HostEvent]:
        """Nothing happens."""
        return self.events.subscribe()

    def record(self, name: str) -> Subscription[Block]:
        """Of the one VM."""
        self.vm(name)
        return self.batches.subscribe()

    def convert(self, count: int, dropped: int = 0) -> None:
        """So many records more, each told apart by its time."""
        records = np.zeros(count, RECORD)
        records["region"], records["size"], records["count"] = 1, 4096, 1
        records["time_ns"] = np.arange(self.sent, self.sent + count)
        self.sent += count
        self.batches.put(Block(records, dropped, self.sent))


@pytest.fixture
def host() -> OneVm:
    """Behind the socket."""
    return OneVm()


@pytest.fixture
async def server(host: OneVm, tmp_path: Path) -> AsyncIterator[ControlServer]:
    """At tmp_path/c.sock."""
    made = ControlServer(tmp_path / "c.sock", host, Limits())  # type: ignore[arg-type]
    await made.start()
    yield made
    await made.stop()


async def start(
    server: ControlServer, *arguments: str, limit: Callable[[], None] | None = None
) -> asyncio.subprocess.Process:
    """The command."""
    return await asyncio.create_subprocess_exec(
        PROGRAM,
        *("record", *arguments, "--socket", str(server.path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=limit,
    )


async def until(done: Callable[[], object]) -> None:
    """Waits for it, twenty seconds at most."""
    async with asyncio.timeout(20):
        while not done():  # noqa: ASYNC110 - files and queues tell nobody
            await asyncio.sleep(0.005)


async def finish(process: asyncio.subprocess.Process, code: int = 0) -> tuple[str, str]:
    """What it printed, once it has ended."""
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode == code, err.decode()
    return out.decode(), err.decode()


def check(trace: Trace, host: OneVm, lost: int = 0) -> None:
    """It has everything that the VM did."""
    assert trace.torn_bytes == 0
    assert trace.dropped == lost
    assert trace.records["time_ns"].tolist() == list(range(host.sent))
    assert (trace.header.vm, trace.header.policy) == ("db", "lazy")
    assert (trace.header.parameters, trace.header.budget_bytes) == ({"max_age": 3.0}, 1 << 20)


@pytest.mark.parametrize("number", SIGNED, ids=lambda number: number.name)
async def test_a_signal_ends_it_whole(
    server: ControlServer, host: OneVm, tmp_path: Path, number: signal.Signals
) -> None:
    """All that was under way is written, and how much was lost is said."""
    process = await start(server, "db", "-o", f"{tmp_path}/t.upm")
    await until(lambda: host.batches)
    host.convert(3, dropped=7)
    host.convert(9000)
    await until(lambda: (tmp_path / "t.upm").stat().st_size > 4096)
    host.convert(2)
    process.send_signal(number)
    out, _ = await finish(process)
    check(read_trace(tmp_path / "t.upm"), host, lost=7)
    assert out.startswith(f"{tmp_path}/t.upm: 9005 records, 7 lost, ")
    assert stat.S_IMODE((tmp_path / "t.upm").stat().st_mode) == 0o600
    await until(lambda: not host.batches)


async def test_it_ends_after_its_time_or_with_the_vm(
    server: ControlServer, host: OneVm, tmp_path: Path
) -> None:
    """Without a signal too."""
    await finish(await start(server, "db", "-o", f"{tmp_path}/a", "--seconds", "0"))
    assert len(read_trace(tmp_path / "a").records) == 0
    process = await start(server, "db", "-o", f"{tmp_path}/b")
    await until(lambda: host.batches)
    host.convert(5)
    host.batches.close()
    out, _ = await finish(process)
    check(read_trace(tmp_path / "b"), host)
    assert out.endswith("; the VM is gone\n")


async def test_a_daemon_that_ends_leaves_what_was_recorded(
    server: ControlServer, host: OneVm, tmp_path: Path
) -> None:
    """An error with a hint, and a file that can be read."""
    process = await start(server, "db", "-o", f"{tmp_path}/t")
    await until(lambda: host.batches)
    host.convert(5)
    await until(lambda: len(read_trace(tmp_path / "t").records) == 5)
    await server.stop()
    _, err = await finish(process, 1)
    assert "hint: " in err
    check(read_trace(tmp_path / "t"), host)


async def test_it_overwrites_only_when_told(server: ControlServer, tmp_path: Path) -> None:
    """A recording may be the only one of its kind."""
    (tmp_path / "t").write_text("precious")
    _, err = await finish(await start(server, "db", "-o", f"{tmp_path}/t"), 1)
    assert "--force" in err
    assert (tmp_path / "t").read_text() == "precious"
    await finish(await start(server, "db", "-o", f"{tmp_path}/t", "--force", "--seconds", "0"))
    assert read_trace(tmp_path / "t").header.vm == "db"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("web", "-o", "{}/t"), "known: db"),
        (("db", "-o", "{}/none/t"), "No such file"),
    ],
    ids=["vm", "directory"],
)
async def test_what_can_not_be_recorded_leaves_no_file(
    server: ControlServer, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """A clear error, with a hint."""
    _, err = await finish(await start(server, *(a.format(tmp_path) for a in arguments)), 1)
    assert message in err
    assert "hint: " in err
    await until(lambda: not (tmp_path / "t").exists())


async def test_a_full_disk_is_said_and_leaves_a_readable_file(
    server: ControlServer, host: OneVm, tmp_path: Path
) -> None:
    """Blocks that were written before are all there."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = await start(server, "db", "-o", f"{tmp_path}/t", limit=limit)
    await until(lambda: host.batches)
    host.convert(100)
    host.convert(10_000)
    _, err = await finish(process, 1)
    assert f"cannot write {tmp_path}/t: File too large" in err
    assert "hint: " in err
    trace = read_trace(tmp_path / "t")
    assert trace.records["time_ns"].tolist() == list(range(100))
    assert trace.torn_bytes > 0
    await until(lambda: not host.batches)
