# SPDX-License-Identifier: GPL-2.0-or-later
"""What a VMM that delays discards must never do: each hazard, provoked, and seen to be held off.

Over memfds in the place of guest_memfds, without QEMU; the kernel's attributes are an array.
"""

from collections.abc import Callable

Hold = Callable[[str], None]


def test_hazard_01_flipped_back(hold: Hold) -> None:
    """Hazard 1: a range that has flipped back is never punched.

    A conversion waits for the punch that is under way in its range; a request that comes after it
    finds nothing.
    """
    hold("flipped-back")


def test_hazard_01_shielded(hold: Hold) -> None:
    """Hazard 1: a discard asked for while KVM has the conversion back in its hands keeps off it."""
    hold("shielded")


def test_hazard_02_in_place(hold: Hold) -> None:
    """Hazard 2: where KVM converts in place there is one copy: nothing is deferred or punched."""
    hold("in-place")


def test_hazard_02_in_place_found_late(hold: Hold) -> None:
    """Hazard 2: copies deferred before KVM was seen to convert in place are not punched either."""
    hold("in-place-later")


def test_hazard_02_in_place_during_a_discard(hold: Hold) -> None:
    """Hazard 2: the same while one of them is being discarded, which counts as that."""
    hold("in-place-during-a-discard")


def test_hazard_03_other_punches(hold: Hold) -> None:
    """Hazard 3: punches of balloons, disks and other threads go through, and are not ours."""
    hold("other-punches")


def test_hazard_03_other_madvise(hold: Hold) -> None:
    """Hazard 3: so does madvise() of memory that no conversion of the thread's has left."""
    hold("other-madvise")


def test_hazard_04_slot_registration(hold: Hold) -> None:
    """Hazard 4: the attributes that QEMU sets on a new slot are no conversion of the guest's."""
    hold("slot-registration")


def test_hazard_05_slot_moves(hold: Hold) -> None:
    """Hazard 5: stale copies are followed while their slot is away, and at its new address."""
    hold("slot-moves")


def test_hazard_06_memory_is_freed(hold: Hold) -> None:
    """Hazard 6: a discard frees memory: files are punched, anonymous memory is given back."""
    hold("memory-is-freed")


def test_hazard_07_huge_pages(hold: Hold) -> None:
    """Hazard 7: shared huge pages are left alone, and counted."""
    hold("huge-pages")


def test_hazard_08_spans_regions(hold: Hold) -> None:
    """Hazard 8: one conversion may touch several regions, slots, and holes between them."""
    hold("spans-regions")


def test_hazard_08_forty_regions(hold: Hold) -> None:
    """Hazards 8 and 22: forty regions in one conversion, with an operation pending elsewhere."""
    hold("forty-regions")


def test_hazard_09_not_ram(hold: Hold) -> None:
    """Hazard 9: conversions of what is no RAM give the kernel's own answer."""
    hold("not-ram")


def test_hazard_10_short_stalls(hold: Hold) -> None:
    """Hazard 10: no call discards more than 2 MiB, and neighbours convert meanwhile."""
    hold("short-stalls")


def test_hazard_11_budget(hold: Hold) -> None:
    """Hazard 11: the backlog is never above the budget, also when that is lowered."""
    hold("budget")


def test_hazard_11_many_vcpus(hold: Hold) -> None:
    """Hazard 11: eight vCPUs at once, lift it by one conversion at most."""
    hold("many-vcpus")


def test_hazard_11_threads_and_memory(hold: Hold) -> None:
    """Hazard 11: the plugin's own memory for a thread, or for a large conversion, goes with it."""
    hold("threads-and-memory")


def test_hazard_11_threads_and_regions(hold: Hold) -> None:
    """Hazard 11: so does what a thread takes for conversions over many regions."""
    hold("threads-and-regions")


def test_hazard_12_notifications_pass(hold: Hold) -> None:
    """Hazard 12: DMA is unmapped before any discard of the copy, and ends nothing."""
    hold("notifications-pass")


def test_hazard_13_closed_region(hold: Hold) -> None:
    """Hazard 13: a closed file is forgotten before its number is another's."""
    hold("closed-region")


def test_hazard_13_closed_while_pending(hold: Hold) -> None:
    """Hazard 13: the same while a conversion in it waits for QEMU's discard."""
    hold("closed-while-pending")


def test_hazard_13_half_closed(hold: Hold) -> None:
    """Hazards 13 and 23: the RAM loses only its file, or only its mapping."""
    hold("half-closed")


def test_hazard_13_unmapped_in_part(hold: Hold) -> None:
    """Hazard 13: a part of the RAM's mapping goes; its neighbours are no part of it."""
    hold("unmapped-in-part")


def test_hazard_13_strangers_close(hold: Hold) -> None:
    """Hazard 13: other threads close and unmap while RAM is plugged and unplugged."""
    hold("strangers-close")


def test_hazard_13_closed_during_a_discard(hold: Hold) -> None:
    """Hazard 13: a file is closed when the discard in it is over, the RAM mapped or not."""
    hold("closed-during-a-discard")


def test_hazard_13_closed_unseen(hold: Hold) -> None:
    """Hazards 13 and 23: a guest_memfd goes by a call unseen, and its number comes again."""
    hold("closed-unseen")


def test_hazard_14_vcpus_do_not_wait(hold: Hold) -> None:
    """Hazard 14: QEMU converts on several vCPUs at once; only the same range waits."""
    hold("vcpus-do-not-wait")


def test_hazard_14_in_turn(hold: Hold) -> None:
    """Hazard 14: a large conversion that waits has its turn before small ones that come later."""
    hold("in-turn")


def test_hazard_14_wide_among_pages(hold: Hold) -> None:
    """Hazard 14: conversions of single pages do not pass by one of a large range for ever.

    Counted are the pages that KVM converts while it waits: one more for each vCPU at most.
    """
    hold("wide-among-pages")


def test_hazard_15_commands_do_not_wait(hold: Hold) -> None:
    """Hazard 15: every command answers while KVM converts and a punch is under way."""
    hold("commands-do-not-wait")


def test_hazard_16_failed_discards(hold: Hold) -> None:
    """Hazard 16: the guest hears of no failed discard; the copy stays stale and is tried again."""
    hold("failed-discards")


def test_hazard_16_drain_retries(hold: Hold) -> None:
    """Hazard 16: a drain that fails is tried again with growing pauses, and said once."""
    hold("drain-retries")


def test_hazard_16_half_failed(hold: Hold) -> None:
    """Hazard 16: of QEMU's own long discard only the chunk that failed is kept, if it fits."""
    hold("half-failed")


def test_hazard_16_failed_round(hold: Hold) -> None:
    """Hazard 16: a short lack of memory that meets a whole drain does not reach the guest."""
    hold("failed-round")


def test_hazard_16_failed_conversions(hold: Hold) -> None:
    """Hazard 16: where KVM refuses, the ledger is as before."""
    hold("failed-conversions")


def test_hazard_19_lease_runs_out(hold: Hold) -> None:
    """Hazard 19: without a daemon, stale copies go when the lease ends, and none come after."""
    hold("lease-runs-out")


def test_hazard_21_not_asked_for(hold: Hold) -> None:
    """Hazard 21: what QEMU does not ask for is discarded by nobody, whatever is urged."""
    hold("not-asked-for")


def test_hazard_22_leftover(hold: Hold) -> None:
    """Hazard 22: a conversion around, over or beside what waits for QEMU's call does not wait."""
    hold("leftover")


def test_hazard_22_ended_threads(hold: Hold) -> None:
    """Hazard 22: a thread that ends before QEMU's call leaves nothing behind."""
    hold("ended-threads")


def test_hazard_22_converts_at_its_end(hold: Hold) -> None:
    """Hazard 22: a thread converts once more while it ends, after what we keep of it has gone."""
    hold("converts-at-its-end")


def test_hazard_23_next_before_the_close(hold: Hold) -> None:
    """Hazard 23: RAM gets its next guest_memfd before the last one is closed."""
    hold("next-before-the-close")


def test_hazard_23_slot_outlives_its_ram(hold: Hold) -> None:
    """Hazards 5 and 23: a slot whose RAM is unmapped, and whose guest_memfd moves to other RAM."""
    hold("slot-outlives-its-ram")


def test_hazard_23_ram_replaced(hold: Hold) -> None:
    """Hazard 23: memory without a file takes the place of RAM whose file stays open."""
    hold("ram-replaced")


def test_hazard_24_served_meanwhile(hold: Hold) -> None:
    """Hazard 24: while the ledger is drained, requests and bells are served."""
    hold("served-meanwhile")


def test_hazard_25_acceptance(hold: Hold) -> None:
    """Hazards 25 and 32: what changes nothing is not stale, and QEMU's call gives memory back."""
    hold("acceptance")


def test_hazard_26_one_bad_page(hold: Hold) -> None:
    """Hazard 26: a page that can't be punched holds up no other, by drain or by request."""
    hold("one-bad-page")


def test_hazard_26_lowered_in_a_pause(hold: Hold) -> None:
    """Hazard 26: a smaller budget is kept at once, not after the pause that a bad page causes."""
    hold("lowered-in-a-pause")


def test_hazard_26_lease_in_a_pause(hold: Hold) -> None:
    """Hazards 19 and 26: nor does a lease that runs out wait for the end of that pause."""
    hold("lease-in-a-pause")


def test_hazard_26_no_punch_works(hold: Hold) -> None:
    """Hazard 26: where nothing can be discarded QEMU hears of it; one success heals."""
    hold("no-punch-works")


def test_hazard_27_int_requests(hold: Hold) -> None:
    """Hazard 27: an ioctl's number that is an int, as QEMU 9.1 passes it."""
    hold("int-requests")


def test_hazard_29_mirror_of_many_runs(hold: Hold) -> None:
    """Hazard 29: a reader's copy of the ledger is right after more runs than the record tells of.

    Also where its portions of the record end just before or behind what is missing.
    """
    hold("mirror-of-many-runs")


def test_hazard_29_mirror_of_resets(hold: Hold) -> None:
    """Hazard 29: a reader hears that copies went with a reset, or with the RAM's mapping."""
    hold("mirror-of-resets")


def test_hazard_29_one_copy_eager(hold: Hold) -> None:
    """Hazard 29: when one copy's mode is eager again it is drained, and the other one stays."""
    hold("one-copy-eager")
