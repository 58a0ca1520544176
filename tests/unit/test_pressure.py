# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory pressure from trees that a test has made."""

import os
import select
from pathlib import Path

import pytest

from qmp_upm.policy import Pressure
from qmp_upm.pressure import PressureFiles
from qmp_upm.trigger import Trigger

PSI = "some avg10={} avg60=1.00 avg300=2.00 total=3\nfull avg10={} avg60=0.00 avg300=0.00 total=0\n"


@pytest.fixture
def files(tmp_path: Path) -> PressureFiles:
    """A host under some pressure, and process 7 in a cgroup."""
    (tmp_path / "proc" / "pressure").mkdir(parents=True)
    (tmp_path / "proc" / "7").mkdir()
    (tmp_path / "proc" / "pressure" / "memory").write_text(PSI.format("1.25", "0.50"))
    (tmp_path / "proc" / "7" / "cgroup").write_text("0::/machine.slice/a.scope\n")
    group = tmp_path / "cgroup" / "machine.slice" / "a.scope"
    group.mkdir(parents=True)
    (group / "memory.pressure").write_text(PSI.format("30.00", "20.00"))
    (group / "memory.current").write_text("1048576\n")
    (group / "memory.max").write_text("max\n")
    return PressureFiles(tmp_path / "proc", tmp_path / "cgroup")


def test_all_of_it(files: PressureFiles) -> None:
    """The host's averages, and the cgroup's with its memory; no limit is None."""
    assert files.of_vm(files.of_host(), 7) == Pressure(1.25, 0.5, 30.0, 20.0, 1 << 20, None)


def test_limit(files: PressureFiles) -> None:
    """A limit in bytes is one."""
    (files.cgroup / "machine.slice" / "a.scope" / "memory.max").write_text("2097152\n")
    assert files.of_vm(files.of_host(), 7).cgroup_limit_bytes == 2 << 20


def test_a_threaded_leaf_is_left_for_its_scope(files: PressureFiles) -> None:
    """As libvirt has it: the leaf has no memory of its own; limits further up hold, too."""
    slice_ = files.cgroup / "machine.slice"
    leaf = slice_ / "a.scope" / "libvirt" / "emulator"
    leaf.mkdir(parents=True)
    (leaf / "memory.pressure").write_text(PSI.format("0.00", "0.00"))
    (files.proc / "7" / "cgroup").write_text("0::/machine.slice/a.scope/libvirt/emulator\n")
    (slice_ / "a.scope" / "memory.max").write_text("4194304\n")
    (slice_ / "memory.max").write_text("3145728\n")
    expected = Pressure(1.25, 0.5, 30.0, 20.0, 1 << 20, 3 << 20)
    assert files.of_vm(files.of_host(), 7) == expected


def test_what_is_not_there_is_not_known(files: PressureFiles) -> None:
    """A process that has gone, a cgroup of version 1, a kernel without PSI."""
    host = files.of_host()
    assert files.of_vm(host, 8) == host
    (files.proc / "7" / "cgroup").write_text("4:memory:/x\n")
    assert files.of_vm(host, 7) == host
    (files.proc / "pressure" / "memory").unlink()
    assert files.of_host() == Pressure()


@pytest.mark.parametrize("text", ["", "some\n", "some avg10=x\n", "\0\n", "full avg10=-5\n"])
def test_nonsense_is_no_pressure(files: PressureFiles, text: str) -> None:
    """A file that says something else than the kernel's says nothing."""
    (files.proc / "pressure" / "memory").write_text(text)
    assert files.of_host() == Pressure()


PSI_FILE = Path("/proc/pressure/memory")


@pytest.mark.skipif(not os.access(PSI_FILE, os.W_OK), reason="needs PSI that takes triggers")
async def test_the_kernel_takes_our_trigger() -> None:
    """The real file: it is polled while the trigger is there, and closed after."""
    with Trigger(PSI_FILE) as trigger:
        assert trigger._poll is not None
        await trigger.wait(0.01)
    assert trigger._poll is None


async def test_without_a_trigger_time_passes(tmp_path: Path) -> None:
    """No such file, and one that takes anything and is never told of: as if nobody had asked."""
    plain = tmp_path / "memory"
    for text in (None, "some avg10=0.00\n"):
        if text:
            plain.write_text(text)
        with Trigger(plain) as trigger:
            await trigger.wait(0.01)
            assert not trigger.is_fresh


class _Told:
    """A poll set in which something has happened."""

    def __init__(self, event: int) -> None:
        self.event = event

    def poll(self, _seconds: int) -> list[tuple[int, int]]:
        """That."""
        return [(7, self.event)]


async def test_a_trigger_wakes_and_counts_for_a_while(tmp_path: Path) -> None:
    """Whoever waits goes on at once, however long he would have waited."""
    with Trigger(tmp_path / "none") as trigger:
        trigger._poll = _Told(select.EPOLLPRI)  # type: ignore[assignment]
        trigger._on_event()
        trigger._poll = None
        await trigger.wait(3600)
        assert trigger.is_fresh
