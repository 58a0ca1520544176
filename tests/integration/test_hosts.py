# SPDX-License-Identifier: GPL-2.0-or-later
"""What other QEMUs, hosts and guests do differently, in a stock QEMU that is told what to convert.

Real: QEMU, its memory backends, the guest_memfds, the plugin. Simulated, by preloads: requests as
QEMU 9.1 passes them (`narrow.c`), a folder of descriptors that is denied (`nofds.c`), holes that
can't be punched (`failing.c`), the answer of the attribute ioctl, and that memory is private from
which the guest's firmware runs all the same.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest import DEFER, MEMFD, MIB, PAGE, Guest, has_guest_memfd, until
from tests.integration.sides import DaemonProcess

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-system-x86_64") and has_guest_memfd()),
    reason="needs QEMU, and /dev/kvm with guest_memfd for any VM (Linux 6.18)",
)

PROGRAM = Path(sys.executable).with_name("qmp-upm")
FILE = "memory-backend-memfd"
AT = 64 * MIB
ACCEPTED, SINGLY = 128 * MIB, 8 * MIB


def defers_both(vm: Guest) -> None:
    """Either copy is kept, and given back when it is asked for."""
    vm.fill(FILE, AT, MIB)
    assert vm.convert(AT, MIB, private=True) == 0
    assert vm.stale() == (0, MIB)
    assert vm.held(FILE, AT, MIB) == MIB
    assert [region["backing"] for region in vm.regions()] == ["memfd"]
    assert vm.convert(AT, MIB, private=False) == 0
    assert vm.stale() == (MIB, 0)
    assert vm.convert(AT, MIB, private=True) == 0
    vm.drain()
    assert vm.held(FILE, AT, MIB) == 0


def test_requests_as_qemu_9_1_passes_them(guest: Any) -> None:
    """An int, sign-extended: the region is found and both copies are deferred."""
    vm = guest(*MEMFD, before=("narrow.c",))
    assert len(vm.regions()) == 1
    defers_both(vm)


def test_without_a_look_at_its_descriptors(guest: Any) -> None:
    """As under libvirt's AppArmor profile: both copies of a memfd are deferred all the same."""
    defers_both(guest(*MEMFD, before=("nofds.c",)))


def test_a_host_that_refuses_discards(
    guest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be discarded is kept, for a while; then the guest's conversions fail as ever.

    The budget holds all the same, and it is over with the first discard that succeeds.
    """
    flag = tmp_path / "failing"
    monkeypatch.setenv("TEST_FAILING", str(flag))
    modes = {"private": "eager", "shared": "eager", "budget": MIB}
    vm = guest(*MEMFD, behind=("failing.c",), configuration=modes)
    vm.fill(FILE, AT, 4 * MIB)
    flag.touch()
    results = [vm.convert(AT + n * PAGE, PAGE, private=True) for n in range(0, 512, 2)]
    assert results[:4] == [0] * 4
    assert results[-1] != 0
    assert [region["state"] for region in vm.regions()] == ["failing"]
    kept = vm.cmd("x-upm-query")["stale"]
    assert 0 < kept["shared"] == PAGE * results.count(0) <= kept["peak"] <= MIB
    flag.unlink()
    until(lambda: vm.stale() == (0, 0), "an empty ledger")
    assert [region["state"] for region in vm.regions()] == ["followed"]
    assert vm.convert(AT + MIB, MIB, private=True) == 0
    assert vm.held(FILE, AT + MIB, MIB) == 0


@pytest.fixture
def private_mapping(guest: Any, tmp_path: Path) -> Guest:
    """A guest whose shared memory is a private mapping of a file."""
    vm: Guest = guest(
        *("-machine", "q35,smm=off,memory-backend=ram", "-m", "256"),
        *("-object", f"memory-backend-file,id=ram,size=256M,share=off,mem-path={tmp_path}/ram"),
    )
    return vm


def test_a_private_mapping_is_left_alone(private_mapping: Guest) -> None:
    """Of its shared copies QEMU's discards are made, and the plugin says which it does not know."""
    vm = private_mapping
    assert vm.regions()[0]["backing"] == "unknown"
    assert vm.convert(AT, MIB, private=True) == 0
    assert vm.stale() == (0, 0)
    assert vm.convert(AT, MIB, private=False) == 0
    assert vm.stale() == (MIB, 0)
    assert vm.regions()[0]["backing"] == "unknown"


def test_a_private_mapping_is_told(private_mapping: Guest, tmp_path: Path) -> None:
    """By show and by doctor, in plain words, each with what to do."""
    monitor = tmp_path / "second"
    found = subprocess.run(
        [PROGRAM, "doctor", "--json", "--socket", monitor],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    check = next(c for c in json.loads(found)["checks"] if c["name"] == "monitor second")
    assert check["status"] == "warn"
    assert "shared copies" in check["seen"]
    assert "share=on" in check["action"]
    daemon = DaemonProcess(tmp_path, monitor, 8 * MIB, 10_000)
    try:
        until(lambda: daemon.view()["state"] == "attached", "attached")
        shown = subprocess.run(
            [PROGRAM, "show", "guest"],
            env=dict(os.environ, QMP_UPM_SOCKET=str(tmp_path / "control"), COLUMNS="200"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "shared copies" in shown
        assert "share=on" in shown
    finally:
        daemon.close()
    assert private_mapping.process.poll() is None


def accept(vm: Guest) -> None:
    """The guest makes private memory private, as SNP's do: a part page by page, then in blocks."""
    for at in range(AT, AT + SINGLY, PAGE):
        assert vm.convert(at, PAGE, private=True) == 0
    for at in range(AT + SINGLY, AT + ACCEPTED, 2 * MIB):
        assert vm.convert(at, 2 * MIB, private=True) == 0


MODES = [
    {"private": private, "shared": shared, "budget": 1 << 40}
    for private in ("eager", "defer")
    for shared in ("eager", "defer")
]


@pytest.fixture
def preallocated(guest: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``preallocated(**how)``: a guest that boots from private memory, all of it allocated."""
    monkeypatch.setenv("LAB_PRIVATE", "0")
    return lambda **how: guest(*MEMFD[:-1], f"{MEMFD[-1]},prealloc=on", **how)


def test_stock_gives_back_what_is_accepted(preallocated: Any) -> None:
    """Control: without the plugin no byte of the accepted memory stays allocated."""
    vm = preallocated(plugin=False)
    assert vm.held(FILE, AT, ACCEPTED) == ACCEPTED
    accept(vm)
    assert vm.held(FILE, AT, ACCEPTED) == 0


@pytest.mark.parametrize("modes", MODES, ids=lambda m: f"{m['private']}-{m['shared']}")
def test_acceptance_gives_back_what_stock_does(preallocated: Any, modes: Any) -> None:
    """In any mode, and nothing of it enters the ledger; what the guest shares later does."""
    vm = preallocated(configuration=modes)
    assert vm.held(FILE, AT, ACCEPTED) == ACCEPTED
    accept(vm)
    assert vm.held(FILE, AT, ACCEPTED) == 0
    stale = vm.cmd("x-upm-query")["stale"]
    assert (stale["private"], stale["shared"], stale["peak"]) == (0, 0, 0)
    vm.cmd("x-upm-configure", **DEFER)
    assert vm.convert(AT, MIB, private=False) == 0
    assert vm.convert(AT, MIB, private=True) == 0
    assert vm.stale() == (0, MIB)
