# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's discard comes late: it owns the pages whose last conversion was its thread's own."""

from collections.abc import Callable

Hold = Callable[[str], None]


def test_taken_back_deferred(hold: Hold) -> None:
    """A page shared again before the discard came is not stale, deferring."""
    hold("taken-back-deferred")


def test_taken_back_eagerly(hold: Hold) -> None:
    """A page shared again before the discard came is not punched, eagerly."""
    hold("taken-back-eagerly")


def test_given_back_deferred(hold: Hold) -> None:
    """The other direction, deferring."""
    hold("given-back-deferred")


def test_given_back_eagerly(hold: Hold) -> None:
    """The other direction, eagerly."""
    hold("given-back-eagerly")


def test_there_and_back(hold: Hold) -> None:
    """Who converted last owns the discard, though the page is as the first one left it."""
    hold("there-and-back")


def test_same_way(hold: Hold) -> None:
    """Two conversions to the same side: the second one's call is the last."""
    hold("same-way")


def test_during_the_discard(hold: Hold) -> None:
    """Pages behind the chunk that QEMU is discarding are converted back meanwhile."""
    hold("during-the-discard")


def test_during_the_conversion(hold: Hold) -> None:
    """QEMU's late discard keeps off what KVM is converting back, which may fail."""
    hold("during-the-conversion")


def test_registered_meanwhile_deferred(hold: Hold) -> None:
    """QEMU registers the slot anew before the discard came, deferring: it is still owned."""
    hold("registered-meanwhile-deferred")


def test_registered_meanwhile_eagerly(hold: Hold) -> None:
    """QEMU registers the slot anew before the discard came, eagerly: the memory goes."""
    hold("registered-meanwhile-eagerly")
