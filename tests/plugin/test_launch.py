# SPDX-License-Identifier: GPL-2.0-or-later
"""Launch and reset: what QEMU does before the first KVM_RUN, and what outlives it.

The order of QEMU's calls is real; firmware, measurement and KVM are not there.
"""

from collections.abc import Callable

Hold = Callable[[str], None]


def test_launch_source(hold: Hold) -> None:
    """Hazards 21 and 31: what KVM reads during a launch is left alone, then and later."""
    hold("launch-source")


def test_resets(hold: Hold) -> None:
    """Hazard 23: sixteen resets with copies stale on both sides leak none."""
    hold("resets")


def test_reset_source(hold: Hold) -> None:
    """Hazard 31: what the last boot left stale is not discarded before the first KVM_RUN."""
    hold("reset-source")


def test_closed_before_the_vm(hold: Hold) -> None:
    """Hazard 31: a launch begins with the close of a guest_memfd whose RAM lives on."""
    hold("closed-before-the-vm")


def test_reset_of_two(hold: Hold) -> None:
    """Hazard 23: blocks of the same size keep their own copies at a reset; RAM may go meanwhile."""
    hold("reset-of-two")


def test_no_room_at_reset(hold: Hold) -> None:
    """Hazards 23 and 31: RAM that can't be followed after a reset loses no live page."""
    hold("no-room-at-reset")


def test_reset_during_a_discard(hold: Hold) -> None:
    """Hazard 31: QEMU's reset waits for the discard that is under way, and no other comes."""
    hold("reset-during-a-discard")
