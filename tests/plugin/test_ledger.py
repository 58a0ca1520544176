# SPDX-License-Identifier: GPL-2.0-or-later
"""The ledger, the record and what a client asks for."""

from collections.abc import Callable

Hold = Callable[[str], None]


def test_model(hold: Hold) -> None:
    """The ledger is page by page what a model of the rules says, over 3,000 random steps."""
    hold("model")


def test_large(hold: Hold) -> None:
    """Conversions of 400 MiB: more than is worked through in one hold of the lock."""
    hold("large")


def test_closes_meanwhile(hold: Hold) -> None:
    """What was deferred is accounted for at any time, also amid a conversion of 256 MiB."""
    hold("closes-meanwhile")


def test_requests(hold: Hold) -> None:
    """Every range of a request is done, in each copy; the queue has an end."""
    hold("requests")


def test_one_copy_asked_for(hold: Hold) -> None:
    """A request of one copy ends with it, though the next region's discards have failed."""
    hold("one-copy-asked-for")


def test_records(hold: Hold) -> None:
    """A conversion is recorded once, also if it is read before QEMU asks for the discard."""
    hold("records")


def test_records_in_order(hold: Hold) -> None:
    """A conversion is on record before the one that takes its pages over."""
    hold("records-in-order")


def test_many_runs(hold: Hold) -> None:
    """A conversion over 513 runs of stale pages has no record of each: its reader is told."""
    hold("many-runs")


def test_overrun(hold: Hold) -> None:
    """Records that nobody has read are counted when they are overwritten."""
    hold("overrun")


def test_bells(hold: Hold) -> None:
    """The bell rings once until somebody reads; the budget's event at most once a second."""
    hold("bells")


def test_signals(hold: Hold) -> None:
    """The plugin's thread takes none of QEMU's signals."""
    hold("signals")


def test_sleeps(hold: Hold) -> None:
    """The plugin's thread takes no CPU time while nothing is due."""
    hold("sleeps")


def test_after_the_worker(hold: Hold) -> None:
    """While QEMU ends, its other threads convert and close files without the plugin's."""
    hold("after-the-worker")


def test_duplicate(hold: Hold) -> None:
    """The RAM's descriptor has a duplicate with a lower number, which is closed."""
    hold("duplicate")


def test_too_many(hold: Hold) -> None:
    """More RAM than there is room for is QEMU's own, and said so."""
    hold("too-many")


def test_unterminated(hold: Hold) -> None:
    """JSON that does not end is not read on behind its end."""
    hold("unterminated")
