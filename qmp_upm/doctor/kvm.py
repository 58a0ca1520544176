# SPDX-License-Identifier: GPL-2.0-or-later
"""What this host's KVM can do.

Capabilities are asked for, never guessed from the kernel's version: distributions backport them.
Numbers are those of include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h, Linux 6.18.
Attributes of a guest_memfd itself, with which KVM converts in place, have no settled number yet:
the plugin sees them in use, and the monitor of a running VM tells.
"""

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from qmp_upm.doctor.check import Check, Places, Status, read_text

KVM_CHECK_EXTENSION = 0xAE03
CAP_EXIT_HYPERCALL = 201
CAP_MEMORY_ATTRIBUTES = 233
CAP_GUEST_MEMFD = 234
CAP_VM_TYPES = 235
CAP_GUEST_MEMFD_FLAGS = 244
CAPABILITIES = (
    CAP_EXIT_HYPERCALL,
    CAP_MEMORY_ATTRIBUTES,
    CAP_GUEST_MEMFD,
    CAP_VM_TYPES,
    CAP_GUEST_MEMFD_FLAGS,
)
HC_MAP_GPA_RANGE = 1 << 12
ATTRIBUTE_PRIVATE = 1 << 3
MEMFD_MAPPABLE = 1 << 0

VM_KINDS = ("default", "sw-protected", "sev", "sev-es", "sev-snp", "tdx")
"""By the number of KVM_CREATE_VM's machine type; the plugin uses the same words."""

CONVERTING = frozenset({"sw-protected", "sev-snp", "tdx"})
"""Those whose guests have two backings for a page."""

Ask = Callable[[Path, Iterable[int]], Mapping[int, int]]


def ask_kvm(device: Path, capabilities: Iterable[int]) -> dict[int, int]:
    """Each capability's answer; 0 is no. Raises OSError if the device can't be opened."""
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        return {
            capability: fcntl.ioctl(descriptor, KVM_CHECK_EXTENSION, capability)
            for capability in capabilities
        }
    finally:
        os.close(descriptor)


def check_kvm(places: Places, ask: Ask = ask_kvm) -> Iterator[Check]:
    """The device, and what it says."""
    yield _kernel(places)
    try:
        has = ask(places.kvm, CAPABILITIES)
    except FileNotFoundError:
        yield Check(
            "kvm",
            Status.FAIL,
            f"no {places.kvm}",
            "switch virtualisation on in the firmware, and load kvm_amd or kvm_intel",
        )
    except PermissionError:
        yield Check(
            "kvm",
            Status.FAIL,
            f"{places.kvm} may not be opened",
            "run as root, or as a member of the group kvm",
        )
    except OSError as error:
        yield Check("kvm", Status.FAIL, f"{places.kvm}: {error}", "see the kernel's log")
    else:
        yield Check("kvm", Status.OK, f"{places.kvm} answers")
        yield _guest_memfd(has)
        yield _attributes(has)
        yield _hypercall(has)
        yield _kinds(has, places)
        yield _in_place(has)


def _kernel(places: Places) -> Check:
    release = read_text(places.proc / "sys" / "kernel" / "osrelease")
    if release is None:
        return Check(
            "kernel", Status.UNKNOWN, "its version can't be read", f"is {places.proc} mounted?"
        )
    return Check("kernel", Status.OK, f"Linux {release}")


def _guest_memfd(has: Mapping[int, int]) -> Check:
    if has[CAP_GUEST_MEMFD]:
        return Check("guest_memfd", Status.OK, "KVM has guest_memfd")
    return Check(
        "guest_memfd",
        Status.FAIL,
        "KVM has no guest_memfd: no guest here has private memory of its own",
        "Linux 6.8 or newer with CONFIG_KVM_PRIVATE_MEM, since 6.18 CONFIG_KVM_GUEST_MEMFD",
    )


def _attributes(has: Mapping[int, int]) -> Check:
    if has[CAP_MEMORY_ATTRIBUTES] & ATTRIBUTE_PRIVATE:
        return Check("attributes", Status.OK, "pages can be private or shared")
    return Check(
        "attributes",
        Status.FAIL,
        "KVM has no memory attributes: no guest here can convert a page",
        "a kernel and a processor for SEV-SNP (Linux 6.11) or TDX (6.16); "
        "to try without: python -m tests.lab",
    )


def _hypercall(has: Mapping[int, int]) -> Check:
    if has[CAP_EXIT_HYPERCALL] & HC_MAP_GPA_RANGE:
        return Check("hypercall", Status.OK, "a guest's request to convert reaches QEMU")
    return Check(
        "hypercall",
        Status.FAIL,
        "KVM does not hand KVM_HC_MAP_GPA_RANGE to QEMU",
        "Linux 5.14 or newer",
    )


def _kinds(has: Mapping[int, int], places: Places) -> Check:
    mask = has[CAP_VM_TYPES]
    kinds = [kind for number, kind in enumerate(VM_KINDS) if mask >> number & 1]
    seen = f"KVM makes VMs of kind {', '.join(kinds) or 'default'}"
    if {"sev-snp", "tdx"}.intersection(kinds):
        return Check("vm-kinds", Status.OK, seen)
    if CONVERTING.intersection(kinds):
        return Check(
            "vm-kinds",
            Status.WARN,
            seen,
            "enough for the lab, but QEMU makes confidential guests of SEV-SNP or TDX only",
        )
    return Check("vm-kinds", Status.FAIL, f"{seen}; none of them converts pages", _remedy(places))


def _remedy(places: Places) -> str:
    """What stands between this processor and its kind of confidential VM."""
    for module, parameter, kind in (
        ("kvm_amd", "sev_snp", "SEV-SNP"),
        ("kvm_intel", "tdx", "TDX"),
    ):
        value = read_text(places.sys / "module" / module / "parameters" / parameter)
        if value is not None and value not in ("Y", "1"):
            return (
                f"{kind} is off: enable it in the firmware, and load {module} with {parameter}=1; "
                "the kernel's log says what is missing"
            )
    return "SEV-SNP takes an EPYC 7003 or newer, TDX a Xeon of 5th generation or newer"


def _in_place(has: Mapping[int, int]) -> Check:
    if not has[CAP_GUEST_MEMFD_FLAGS] & MEMFD_MAPPABLE:
        return Check("in-place", Status.OK, "guest_memfd is private only: two copies of a page")
    return Check(
        "in-place",
        Status.OK,
        "guest_memfd can be mapped: a QEMU that converts in place has one copy of a page, and the "
        "plugin then defers nothing",
    )
