# SPDX-License-Identifier: GPL-2.0-or-later
"""Random conversions, discards, commands and plugging, against a byte-exact model."""

import json

import pytest

from tests.plugin.conftest import Harness

THREADS, FLIPS, SEED = "3", "2000", "1"


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
@pytest.mark.parametrize("kind", ["memfd", "file", "anonymous", "guest-memfd"])
def test_torture(harness: Harness, kind: str, sanitizers: str) -> None:
    """No live page is touched, the accounting closes, and what is left allocated is what is live.

    ``guest-memfd`` uses KVM's own files, mapped: that takes /dev/kvm and Linux 6.18.
    """
    result = json.loads(harness("torture", sanitizers, kind, THREADS, FLIPS, SEED))
    assert result["violations"] == 0
    assert result["data_errors"] == 0
    assert result["reused_bytes"] > 0
    assert result["requested_bytes"] > 0
    assert result["failsafe_bytes"] > 0
    assert result["inline_bytes"] > 0
