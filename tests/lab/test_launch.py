# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own launch code under the plugin; launch.py's docstring says what is real of it."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest import has_guest_memfd
from tests.lab import launch, newest
from tests.lab.mutant import Edit, build_plugin

pytestmark = pytest.mark.skipif(
    not has_guest_memfd(), reason="needs a /dev/kvm that makes guest_memfds"
)
CASES = (("sev-snp", ""), ("sev-snp", "newest"), ("tdx", "newest"))
DEFERRING = [name for name in launch.runs() if "shared" in name or "both" in name]


def root_of(qemu: str) -> str:
    """Of the newest QEMU, which is fetched if need be; none for the distribution's."""
    return str(newest.root()) if qemu else ""


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(filter(None, case)))
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of one kind and one QEMU: all runs."""
    kind, qemu = request.param
    return launch.launch(kind, root_of(qemu))


def test_the_measurement_is_stocks(result: dict[str, Any]) -> None:
    """Every launch, in every mode, whatever is asked of the plugin meanwhile."""
    assert [row["name"] for row in result["runs"] if not row["measurement_equal"]] == []


def test_it_was_disturbed(result: dict[str, Any]) -> None:
    """Discards were asked for, budgets lowered and leases left during launches."""
    for asked in ("discards_during_launch", "budgets_lowered_during_launch", "leases_run_out"):
        assert sum(row[asked] for row in result["runs"]) > 0 or not result["disturbed_launches"]


def test_nobody_waits(result: dict[str, Any]) -> None:
    """Conversions around the launch's pages end, and so do updates of memory slots meanwhile."""
    assert result["stuck_threads"] == 0


def test_resets(result: dict[str, Any]) -> None:
    """QEMU 11 launches again ten times; the last boot's stale copies were there each time."""
    if result["resets"]:
        stale = [row["least_stale_pages_before_reset"] for row in result["runs"]]
        assert result["resets"] == 10
        assert max(stale) > 0
    else:
        assert "version 11" in result["resets_reason"]


def test_nothing_leaks_at_a_reset(result: dict[str, Any]) -> None:
    """What the shared file holds after each reset is what stock QEMU's holds, and the ledger."""
    assert [row["name"] for row in result["runs"] if not row["ledger_is_true"]] == []
