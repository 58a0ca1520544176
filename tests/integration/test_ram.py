# SPDX-License-Identifier: GPL-2.0-or-later
"""Every shape of guest RAM, in a stock QEMU that is told what to convert.

Real: QEMU, its memory backends, the guest_memfds, the plugin. The attribute ioctl answers at once.
"""

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest import DEFER, MEMFD, MIB, PAGE, has_guest_memfd

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-system-x86_64") and has_guest_memfd()),
    reason="needs QEMU, and /dev/kvm with guest_memfd for any VM (Linux 6.18)",
)


def test_memfd(guest: Any) -> None:
    """Shared memfd: deferred, given back, and the memory is the host's again."""
    vm = guest(*MEMFD)
    vm.fill("memory-backend-memfd", 64 * MIB, MIB)
    assert vm.regions()[0]["backing"] == "memfd"
    assert vm.convert(64 * MIB, MIB, private=True) == 0
    assert vm.stale() == (0, MIB)
    assert vm.held("memory-backend-memfd", 64 * MIB, MIB) == MIB
    vm.drain()
    assert vm.held("memory-backend-memfd", 64 * MIB, MIB) == 0


def test_file(guest: Any, tmp_path: Path) -> None:
    """A shared file on disk, from an offset on."""
    file = tmp_path / "ram"
    vm = guest(
        *("-machine", "q35,smm=off,memory-backend=ram", "-m", "256"),
        *("-object", f"memory-backend-file,id=ram,size=256M,share=on,mem-path={file}"),
    )
    vm.fill(str(file), 64 * MIB, MIB)
    assert vm.regions()[0]["backing"] == "file"
    assert vm.convert(64 * MIB, MIB, private=True) == 0
    assert vm.stale() == (0, MIB)
    vm.drain()
    assert vm.held(str(file), 64 * MIB, MIB) == 0


def test_anonymous(guest: Any) -> None:
    """RAM without a file: discarded with madvise()."""
    vm = guest(
        *("-machine", "q35,smm=off,memory-backend=ram", "-m", "256"),
        *("-object", "memory-backend-ram,id=ram,size=256M,share=off"),
    )
    assert vm.regions()[0]["backing"] == "anonymous"
    assert vm.convert(64 * MIB, MIB, private=True) == 0
    assert vm.stale() == (0, MIB)
    vm.drain()
    assert vm.cmd("x-upm-query")["counters"]["failed-discards"] == 0
    assert vm.convert(64 * MIB, MIB, private=False) == 0
    assert vm.stale() == (MIB, 0)


def test_two_nodes(guest: Any) -> None:
    """NUMA nodes with a backend each: a conversion in each, and ranges named by region."""
    vm = guest(
        *("-machine", "q35,smm=off", "-m", "256", "-smp", "2"),
        *("-object", "memory-backend-memfd,id=one,size=128M,share=on"),
        *("-object", "memory-backend-ram,id=two,size=128M"),
        *("-numa", "node,memdev=one,cpus=0", "-numa", "node,memdev=two,cpus=1"),
        backends=2,
    )
    assert [region["backing"] for region in vm.regions()] == ["memfd", "anonymous"]
    assert vm.convert(126 * MIB, MIB, private=True) == 0
    assert vm.convert(130 * MIB, MIB, private=True) == 0
    assert vm.stale() == (0, 2 * MIB)
    assert [region["stale-shared"] for region in vm.regions()] == [MIB, MIB]
    vm.cmd("x-upm-discard", id=1, copy="shared", ranges=[[1, 126 * MIB, MIB], [2, 2 * MIB, MIB]])
    vm.drain()


def test_hot_plug(guest: Any) -> None:
    """A DIMM that comes while the guest runs is followed like the rest of its RAM."""
    vm = guest(
        *("-machine", "q35,smm=off,memory-backend=ram", "-m", "256M,slots=2,maxmem=1G"),
        *("-object", "memory-backend-memfd,id=ram,size=256M,share=on"),
    )
    vm.cmd("cont")
    vm.cmd("object-add", **{"qom-type": "memory-backend-memfd", "id": "more", "size": 128 * MIB})
    vm.cmd("device_add", driver="pc-dimm", id="dimm", memdev="more")
    gpa = vm.cmd("query-memory-devices")[0]["data"]["addr"]
    assert vm.regions()[-1]["slots"] == [{"gpa": gpa, "size": 128 * MIB, "offset": 0}]
    assert vm.convert(gpa, MIB, private=True) == 0
    assert vm.regions()[-1]["stale-shared"] == MIB
    vm.drain()


def test_mmio_and_nothing(guest: Any) -> None:
    """Conversions of what is no RAM are QEMU's affair: its own results, and no record."""
    vm = guest(*MEMFD)
    head = vm.cmd("x-upm-query")["records"]["head"]
    assert vm.convert(0xFEC00000, PAGE, private=False) == 0
    assert vm.convert(1 << 40, PAGE, private=False) == 0
    assert vm.convert(1 << 40, PAGE, private=True) != 0
    assert vm.convert(64 * MIB, 17, private=True) != 0
    assert vm.cmd("x-upm-query")["records"]["head"] == head


def test_sandbox(guest: Any) -> None:
    """Under libvirt's seccomp filter the plugin's thread discards as ever."""
    vm = guest(*MEMFD, "-sandbox", "on,spawn=deny,elevateprivileges=deny,resourcecontrol=deny")
    assert vm.convert(64 * MIB, MIB, private=True) == 0
    vm.drain()
    assert vm.process.poll() is None


def test_second_monitor_and_one_that_never_reads(guest: Any, tmp_path: Path) -> None:
    """Two clients at once; one sends and never reads: the other is served."""
    import socket  # noqa: PLC0415

    vm = guest(*MEMFD)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(str(tmp_path / "second"))
        deaf.sendall(b'{"execute": "qmp_capabilities"}')
        for _ in range(50):
            deaf.sendall(b'{"execute": "x-upm-query"}')
        vm.cmd("x-upm-configure", **{"notify-ms": 1})
        for i in range(200):
            assert vm.convert(64 * MIB + i * PAGE, PAGE, private=True) == 0
            vm.cmd("x-upm-read", cursor=0, max=1)
        assert vm.stale() == (0, 200 * PAGE)


def test_quit_in_the_middle_of_a_drain(guest: Any) -> None:
    """QEMU ends at once, and with its own exit code."""
    vm = guest(*MEMFD)
    vm.fill("memory-backend-memfd", 32 * MIB, 192 * MIB)
    assert vm.convert(32 * MIB, 192 * MIB, private=True) == 0
    vm.cmd("x-upm-discard", id=1, copy="both", all=True)
    vm.cmd("quit")
    assert vm.process.wait(timeout=20) == 0


def test_daemonize(guest: Any, tmp_path: Path) -> None:
    """A QEMU that goes into the background opens KVM there, and so does the plugin begin there."""
    vm = guest(*MEMFD, "-daemonize", "-pidfile", str(tmp_path / "pid"))
    pid = int((tmp_path / "pid").read_text())
    try:
        assert vm.convert(64 * MIB, MIB, private=True) == 0
        vm.drain()
        names = [p.read_text().strip() for p in Path(f"/proc/{pid}/task").glob("*/comm")]
        assert "qmp-upm" in names
    finally:
        os.kill(pid, signal.SIGKILL)


NASTY: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        "private",
        "shared",
        "both",
        "defer",
        "eager",
        "keep",
        "\x00",
        "x" * 4096,
    ),
    *(
        -1,
        0,
        1,
        4095,
        4096,
        1 << 20,
        (1 << 31) - 1,
        1 << 32,
        (1 << 63) - 1,
        1 << 63,
        1 << 64,
        -(1 << 63),
    ),
    *(0.5, 1e300, [], {}, [[]], [[1, 0]], [[1, 0, 4096]], [[1, 4096, 0]], [[1, 1, 4096]]),
    *([[1, -4096, 4096]], [[1, 0, 1 << 62]], [[1, (1 << 63) - 4096, 4096]], [[99, 0, 4096]]),
    *([[1, 0, 8192], [1, 4096, 8192]], [[1, 0, 4096]] * 16385, {"a": {"b": [{}]}}),
]
PARAMETERS = {
    "x-upm-query": ("x",),
    "x-upm-configure": (
        *("private", "shared", "budget", "lease-ms", "on-lease-expiry", "notify-ms", "x"),
    ),
    "x-upm-read": ("cursor", "max", "x"),
    "x-upm-stale": ("copy", "region", "cursor", "max", "x"),
    "x-upm-discard": ("id", "copy", "ranges", "all", "x"),
}
FUZZ_CASES = 400


def test_fuzzed_commands(guest: Any) -> None:
    """Whatever the arguments: a reply, or an error with a reason that has changed nothing."""
    vm = guest(*MEMFD)
    choose = random.Random(1)  # noqa: S311 - repeatable, not secret
    assert vm.convert(64 * MIB, MIB, private=True) == 0
    refused = accepted = 0
    for _ in range(FUZZ_CASES):
        name = choose.choice(list(PARAMETERS))
        keys = choose.sample(PARAMETERS[name], choose.randint(0, len(PARAMETERS[name])))
        arguments = {key: choose.choice(NASTY) for key in keys}
        before = vm.cmd("x-upm-query")
        reply = vm.monitor.cmd_obj({"execute": name, "arguments": arguments})
        if "error" not in reply:
            accepted += 1
            vm.cmd("x-upm-configure", **DEFER, **{"lease-ms": 0})
            continue
        refused += 1
        assert reply["error"]["desc"]
        after = vm.cmd("x-upm-query")
        for key in ("modes", "budget", "notify-ms", "records", "regions"):
            assert after[key] == before[key], arguments
    assert accepted > FUZZ_CASES // 50
    assert refused > FUZZ_CASES // 2
    assert vm.process.poll() is None
