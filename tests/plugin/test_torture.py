# SPDX-License-Identifier: GPL-2.0-or-later
"""Random conversions, discards, commands, plugging and resets, against a byte-exact model.

`plugin/tests/torture` by hand, with a number of seconds as its last argument, runs for so long.
"""

import json

import pytest

from tests.plugin.conftest import Harness

THREADS, FLIPS, SEED = "3", "400", "1"
HAPPENED = (
    *("reused_bytes", "requested_bytes", "failsafe_bytes", "inline_bytes", "left_alone_bytes"),
    *("plugged", "resets", "ended_threads", "refused_calls"),
)


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
@pytest.mark.parametrize("kind", ["memfd", "file", "anonymous", "guest-memfd"])
def test_torture(harness: Harness, kind: str, sanitizers: str) -> None:
    """No live page is touched, the budget holds at every step, and all agrees at the end.

    That is: contents, the ledger page by page, what is allocated, and the accounting; with system
    calls that fail, threads that end, and a VM that is rebuilt. ``guest-memfd`` uses KVM's own
    files, mapped: that takes /dev/kvm and Linux 6.18.
    """
    result = json.loads(harness("torture", sanitizers, kind, THREADS, FLIPS, SEED))
    assert result["violations"] == 0
    assert result["data_errors"] == 0
    assert [what for what in HAPPENED if not result[what]] == []
