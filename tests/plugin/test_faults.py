# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory, files, threads and functions that can't be had: an error, or QEMU's own way."""

from tests.plugin.conftest import Harness

SANITIZERS = "address,undefined"


def test_commands(harness: Harness) -> None:
    """Each allocation of each command fails once: an error with a reason, and nothing changed."""
    harness("faults", SANITIZERS, "commands")


def test_regions(harness: Harness) -> None:
    """RAM plugged while nothing can be had is QEMU's own."""
    harness("faults", SANITIZERS, "regions")


def test_conversions(harness: Harness) -> None:
    """RAM whose conversion can't be followed is QEMU's own from then on, with nothing stale."""
    harness("faults", SANITIZERS, "conversions")


def test_lost_slot(harness: Harness) -> None:
    """A slot that can't be stored when it comes back: no live page of its RAM is discarded."""
    harness("faults", SANITIZERS, "lost-slot")


def test_reset(harness: Harness) -> None:
    """A reset whose guest_memfd can't be followed: no live page of the next boot is discarded."""
    harness("faults", SANITIZERS, "reset")


def test_no_descriptors(harness: Harness) -> None:
    """Where no folder can be read, as under AppArmor, both copies are deferred and drained."""
    harness("faults", SANITIZERS, "no-descriptors")


def test_no_fallocate(harness: Harness) -> None:
    """A program whose C library has no fallocate64() runs."""
    harness("faults", SANITIZERS, "no-fallocate")


def test_no_key(harness: Harness) -> None:
    """Where a thread's end can't be noticed its conversions are not followed."""
    harness("faults", SANITIZERS, "no-key")


def test_no_thread(harness: Harness) -> None:
    """Without its thread the plugin is not in use, and says so."""
    harness("faults", SANITIZERS, "worker")
