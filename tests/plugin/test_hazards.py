# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM that delays discards must never do: each hazard, provoked, and seen to be held off.

Under AddressSanitizer and UndefinedBehaviorSanitizer, over memfds in the place of guest_memfds.
"""

from tests.plugin.conftest import Harness

SANITIZERS = "address,undefined"


def test_hazard_01_flipped_back(harness: Harness) -> None:
    """Hazard 1: a range that has flipped back is never punched.

    A conversion waits for the punch that is under way in its range; a request that comes after it
    finds nothing.
    """
    harness("hazards", SANITIZERS, "flipped-back")


def test_hazard_02_in_place(harness: Harness) -> None:
    """Hazard 2: where KVM converts in place there is one copy: nothing is deferred or punched."""
    harness("hazards", SANITIZERS, "in-place")


def test_hazard_02_in_place_found_late(harness: Harness) -> None:
    """Hazard 2: copies deferred before KVM was seen to convert in place are not punched either."""
    harness("hazards", SANITIZERS, "in-place-later")


def test_hazard_03_other_punches(harness: Harness) -> None:
    """Hazard 3: punches of balloons, disks and other threads go through, and are not ours."""
    harness("hazards", SANITIZERS, "other-punches")


def test_hazard_04_slot_registration(harness: Harness) -> None:
    """Hazard 4: the attributes that QEMU sets on a new slot are no conversion of the guest's."""
    harness("hazards", SANITIZERS, "slot-registration")


def test_hazard_05_slot_moves(harness: Harness) -> None:
    """Hazard 5: stale copies are followed while their slot is away, and at its new address."""
    harness("hazards", SANITIZERS, "slot-moves")


def test_hazard_06_memory_is_freed(harness: Harness) -> None:
    """Hazard 6: a discard frees memory: files are punched, anonymous memory is given back."""
    harness("hazards", SANITIZERS, "memory-is-freed")


def test_hazard_07_huge_pages(harness: Harness) -> None:
    """Hazard 7: shared huge pages are left alone, and counted."""
    harness("hazards", SANITIZERS, "huge-pages")


def test_hazard_08_spans_regions(harness: Harness) -> None:
    """Hazard 8: one conversion may touch several regions, slots, and holes between them."""
    harness("hazards", SANITIZERS, "spans-regions")


def test_hazard_09_not_ram(harness: Harness) -> None:
    """Hazard 9: conversions of what is no RAM give the kernel's own answer."""
    harness("hazards", SANITIZERS, "not-ram")


def test_hazard_10_short_stalls(harness: Harness) -> None:
    """Hazard 10: no call discards more than 2 MiB, and neighbours convert meanwhile."""
    harness("hazards", SANITIZERS, "short-stalls")


def test_hazard_11_budget(harness: Harness) -> None:
    """Hazard 11: the backlog is never above the budget, also when that is lowered."""
    harness("hazards", SANITIZERS, "budget")


def test_hazard_12_notifications_pass(harness: Harness) -> None:
    """Hazard 12: DMA is unmapped at the conversion, not when the copy goes."""
    harness("hazards", SANITIZERS, "notifications-pass")


def test_hazard_13_closed_region(harness: Harness) -> None:
    """Hazard 13: a closed file is forgotten before its number is another's; QEMU's rebuilt VM."""
    harness("hazards", SANITIZERS, "closed-region")


def test_hazard_14_vcpus_do_not_wait(harness: Harness) -> None:
    """Hazard 14: QEMU converts on several vCPUs at once; only the same range waits."""
    harness("hazards", SANITIZERS, "vcpus-do-not-wait")


def test_hazard_15_commands_do_not_wait(harness: Harness) -> None:
    """Hazard 15: every command answers while KVM converts and a punch is under way."""
    harness("hazards", SANITIZERS, "commands-do-not-wait")


def test_hazard_16_failed_discards(harness: Harness) -> None:
    """Hazard 16: the guest hears of no failed discard; the copy stays stale and is tried again."""
    harness("hazards", SANITIZERS, "failed-discards")


def test_hazard_16_failed_conversions(harness: Harness) -> None:
    """Hazard 16: where KVM refuses, the ledger is as before."""
    harness("hazards", SANITIZERS, "failed-conversions")


def test_hazard_19_lease_runs_out(harness: Harness) -> None:
    """Hazard 19: without a daemon, stale copies go when the lease ends, and none come after."""
    harness("hazards", SANITIZERS, "lease-runs-out")
