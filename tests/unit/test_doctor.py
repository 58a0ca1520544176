# SPDX-License-Identifier: GPL-2.0-or-later
"""The doctor's findings on hosts made up of files and answers."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from qmp_upm.doctor import Check, Places, Status, examine, works
from qmp_upm.doctor.host import check_host
from qmp_upm.doctor.kvm import (
    ATTRIBUTE_PRIVATE,
    CAP_EXIT_HYPERCALL,
    CAP_GUEST_MEMFD,
    CAP_GUEST_MEMFD_FLAGS,
    CAP_MEMORY_ATTRIBUTES,
    CAP_VM_TYPES,
    HC_MAP_GPA_RANGE,
    VM_KINDS,
    Ask,
    check_kvm,
)
from qmp_upm.errors import TakenError
from qmp_upm.plugin import plugin_path
from qmp_upm.qmp import Monitor

ROOT = Path(__file__).parents[2]
SNP_HOST = {
    CAP_EXIT_HYPERCALL: HC_MAP_GPA_RANGE,
    CAP_MEMORY_ATTRIBUTES: ATTRIBUTE_PRIVATE,
    CAP_GUEST_MEMFD: 1,
    CAP_VM_TYPES: 0b11111,
    CAP_GUEST_MEMFD_FLAGS: 0,
}


def answering(**changed: int) -> Ask:
    """A KVM as an SNP host's, but for these capabilities."""
    has = SNP_HOST | {globals()[f"CAP_{name.upper()}"]: value for name, value in changed.items()}
    return lambda _device, wanted: {capability: has[capability] for capability in wanted}


def failing(error: OSError) -> Ask:
    """A device that can't be opened."""

    def ask(_device: Path, _wanted: Iterable[int]) -> Mapping[int, int]:
        raise error

    return ask


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A host on which all is well, without AppArmor, SELinux or libvirt."""
    written = {
        "dev/kvm": "",
        "proc/sys/kernel/osrelease": "6.12.0\n",
        "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        "cgroup/cgroup.controllers": "cpu io memory pids\n",
    }
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    upm = tmp_path / "run" / "libvirt" / "qemu" / "upm"
    upm.mkdir(parents=True)
    upm.chmod(0o2770)
    (tmp_path / "modules").mkdir()
    return Places(
        kvm=tmp_path / "dev" / "kvm",
        proc=tmp_path / "proc",
        sys=tmp_path / "sys",
        cgroup=tmp_path / "cgroup",
        etc=tmp_path / "etc",
        run=tmp_path / "run",
        modules=(tmp_path / "absent", tmp_path / "modules"),
    )


def write(path: Path, text: str) -> None:
    """A file with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def by_name(checks: Iterable[Check]) -> dict[str, Check]:
    """Findings by name; each is there once."""
    listed = list(checks)
    named = {check.name: check for check in listed}
    assert len(named) == len(listed)
    return named


def test_all_is_well(places: Places) -> None:
    """An SNP host passes every check of KVM and of the host."""
    for check in [*check_kvm(places, answering()), *check_host(places)]:
        assert check.status is Status.OK, check


KVM = [
    ("guest_memfd", answering(guest_memfd=0), Status.FAIL, "CONFIG_KVM_GUEST_MEMFD"),
    ("attributes", answering(memory_attributes=0), Status.FAIL, "SEV-SNP"),
    ("hypercall", answering(exit_hypercall=1), Status.FAIL, "5.14"),
    ("vm-kinds", answering(vm_types=0b1), Status.FAIL, "EPYC"),
    ("vm-kinds", answering(vm_types=0b1101), Status.FAIL, "EPYC"),
    ("vm-kinds", answering(vm_types=0b11), Status.WARN, "lab"),
    ("vm-kinds", answering(vm_types=0b100001), Status.OK, ""),
    ("kvm", failing(FileNotFoundError()), Status.FAIL, "load kvm_amd"),
    ("kvm", failing(PermissionError()), Status.FAIL, "group kvm"),
    ("kvm", failing(OSError(5, "Input/output error")), Status.FAIL, "kernel's log"),
]


@pytest.mark.parametrize(("name", "ask", "status", "action"), KVM)
def test_what_kvm_lacks(places: Places, name: str, ask: Ask, status: Status, action: str) -> None:
    """Each capability that is missing is one finding, with what to do."""
    found = by_name(check_kvm(places, ask))[name]
    assert found.status is status
    assert action in found.action
    assert works([found]) is (status is not Status.FAIL)


@pytest.mark.parametrize(("module", "parameter"), [("kvm_amd", "sev_snp"), ("kvm_intel", "tdx")])
def test_what_is_only_switched_off(places: Places, module: str, parameter: str) -> None:
    """A processor that could is told how."""
    write(places.sys / "module" / module / "parameters" / parameter, "N\n")
    found = by_name(check_kvm(places, answering(vm_types=1)))["vm-kinds"]
    assert f"load {module} with {parameter}=1" in found.action


def test_mappable_guest_memfd_is_said(places: Places) -> None:
    """Conversion in place is possible there: the operator reads what that means."""
    found = by_name(check_kvm(places, answering(guest_memfd_flags=3)))["in-place"]
    assert "one copy" in found.seen


def test_host_without_pressure_and_cgroups(places: Places) -> None:
    """Neither stops the daemon; both are said."""
    (places.proc / "pressure" / "memory").unlink()
    (places.proc / "sys" / "kernel" / "osrelease").unlink()
    (places.cgroup / "cgroup.controllers").write_text("cpu io\n", encoding="utf-8")
    found = by_name(check_host(places))
    assert (found["pressure"].status, found["cgroup"].status) == (Status.WARN, Status.WARN)
    assert "cgroup_disable" in found["cgroup"].action
    (places.cgroup / "cgroup.controllers").unlink()
    found = by_name(check_host(places))
    assert "unified" in found["cgroup"].action
    assert by_name(check_kvm(places, answering()))["kernel"].status is Status.UNKNOWN
    assert works(found.values())


def test_apparmor_step_by_step(places: Places) -> None:
    """With libvirt's profile: the plugin's place, its release, then the rule for the monitors."""

    def found() -> Check:
        return by_name(check_host(places))["apparmor"]

    write(places.sys / "module" / "apparmor" / "parameters" / "enabled", "Y\n")
    assert found().status is Status.OK
    write(places.etc / "apparmor.d" / "abstractions" / "libvirt-qemu", "")
    assert str(places.modules[1]) in found().action
    plugin = places.modules[1] / "qmp-upm.so"
    plugin.write_bytes(b"an older one")
    assert "not the plugin of this release" in found().seen
    plugin.write_bytes(plugin_path().read_bytes())
    rule = re.search(r"'(.*)' in (.*)", found().action)
    assert rule is not None
    write(Path(rule[2]), rule[1])
    assert found().status is Status.OK


def test_selinux_warns(places: Places) -> None:
    """Where it enforces, LD_PRELOAD may not survive."""
    write(places.sys / "fs" / "selinux" / "enforce", "1")
    found = by_name(check_host(places))["selinux"]
    assert (found.status, "noatsecure" in found.action) == (Status.WARN, True)


def test_monitors_need_a_directory_that_lets_the_daemon_in(places: Places) -> None:
    """Its group must be handed on; without the directory nothing can be said."""
    upm = places.run / "libvirt" / "qemu" / "upm"
    upm.chmod(0o755)
    assert by_name(check_host(places))["monitors"].status is Status.WARN
    upm.rmdir()
    assert by_name(check_host(places))["monitors"].status is Status.UNKNOWN


def test_rule_for_monitors_is_the_example_s() -> None:
    """The doctor and examples/libvirt tell the operator the same."""
    readme = (ROOT / "examples" / "libvirt" / "README.md").read_text(encoding="utf-8")
    assert "/{var/,}run/libvirt/qemu/upm/*.monitor rw," in readme


def test_kinds_are_the_plugin_s() -> None:
    """The words for kinds of VM are those that x-upm-query answers."""
    source = (ROOT / "plugin" / "status.c").read_text(encoding="utf-8")
    table = re.search(r"vm_kinds\[\] = \{(.*?)\}", source, re.DOTALL)
    assert table is not None
    assert tuple(re.findall(r'"(.*?)"', table[1])) == VM_KINDS


async def test_nothing_there_is_no_exception(tmp_path: Path) -> None:
    """On a host without anything each check still comes, and says what to do."""
    nowhere = tmp_path / "nothing"
    places = Places(*[nowhere] * 6, modules=(nowhere,))
    checks = await examine(None, [tmp_path / "no.monitor"], places)
    assert not works(checks)
    for check in checks:
        assert check.action or check.status is Status.OK, check


async def test_socket_that_lets_nobody_in(tmp_path: Path, places: Places) -> None:
    """What is no socket, and what nobody listens on, are findings."""
    write(tmp_path / "file", "")
    stale = tmp_path / "stale"
    os.mknod(stale, 0o140666)
    found = by_name(await examine(None, [tmp_path / "file", stale], places, answering()))
    assert "is no socket" in found["monitor file"].seen
    assert "cannot connect" in found["monitor stale"].seen
    assert found["monitor stale"].action


async def test_monitor_that_the_daemon_may_hold(
    tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it is taken may be as it should be: a warning, with how to find out."""

    async def taken(_monitor: Monitor) -> None:
        raise TakenError("accepts, and does not greet", hint="")

    monkeypatch.setattr(Monitor, "connect", taken)
    os.mknod(tmp_path / "m", 0o140666)
    found = by_name(await examine(None, [tmp_path / "m"], places, answering()))["monitor m"]
    assert (found.status, "qmp-upm status" in found.action) == (Status.WARN, True)
