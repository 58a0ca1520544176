# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own launch code under the plugin; launch.py's docstring says what is real of it."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.guest import has_guest_memfd
from tests.lab import newest
from tests.lab.disturber import DISTURBANCES
from tests.lab.launch import is_sound, launch
from tests.lab.launch_real import launch_real
from tests.lab.mutant import Edit, build_plugin

pytestmark = pytest.mark.skipif(
    not has_guest_memfd(), reason="needs a /dev/kvm that makes guest_memfds"
)
STALE_PAGES = 64
"""What each boot leaves stale of the RAM's shared copy, in a place of its own."""
CASES = (("sev-snp", ""), ("sev-snp", "newest"), ("tdx", "newest"))
DEFERS_SHARED = ("defer shared", "defer both")
DISCARDS_DURING_LAUNCH = (
    Edit(
        "worker.c",
        "return !upm.launching && discard_step(now);",
        "return discard_step(now);",
    ),
    Edit(
        "worker.c",
        "earlier(&at, has_excess() && !upm.launching, tour.until);",
        "earlier(&at, has_excess(), tour.until);",
    ),
)
"""Without rule 8 of the design: what a launch rewrites may be discarded before KVM has read it."""
ENTERS_AT_IOCTL = (
    *DISCARDS_DURING_LAUNCH,
    Edit("convert.c", "range, !registration && !launching);", "range, !registration);"),
    Edit(
        "convert.c",
        "    bool launching = __atomic_load_n(&upm.launching, __ATOMIC_RELAXED);\n",
        "",
    ),
    Edit(
        "convert.c",
        "        part->expected = true;\n",
        """        for (uint64_t at = op->first; at < end; at = next_word(at)) {
            if (upm.mode[left] == MODE_DEFER) {
                ledger_add(op->region, left, at, word_mask(at, end));
            }
        }
        part->expected = true;
""",
    ),
)
"""Without rules 2 and 3, too: a copy is stale once KVM has converted, whoever will discard it."""

WAITS_FOR_QEMU = (
    *ENTERS_AT_IOCTL[len(DISCARDS_DURING_LAUNCH) : -1],
    Edit(
        "convert.c",
        "        bool first = op->state == OP_CONVERT ||",
        "        bool first = op->state == OP_CONVERT || op->state == OP_EXPECT ||",
    ),
    Edit(
        "interpose.c",
        "    if (conversion_unfinished()) {\n        conversion_over();\n    }\n",
        "",
    ),
)
"""Without rule 1: a conversion waits for a discard that QEMU never makes for the launch's own."""


def root_of(qemu: str) -> str:
    """Of the newest QEMU, which is fetched if need be; none for the distribution's."""
    return str(newest.root()) if qemu else ""


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(filter(None, case)))
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of one kind and one QEMU: all runs."""
    kind, qemu = request.param
    return launch(kind, root_of(qemu))


def test_the_measurement_is_stocks(result: dict[str, Any]) -> None:
    """Every launch, in every mode, whatever is asked of the plugin meanwhile."""
    assert [row["name"] for row in result["runs"] if not row["measurement_equal"]] == []


def test_it_was_disturbed(result: dict[str, Any]) -> None:
    """In each run somebody asked for discards, lowered the budget or left, during launches.

    A daemon discards what the boot before has left: only where there is one.
    """
    asked = {
        row["name"]: row["discards_during_launch"]
        + row["budgets_lowered_during_launch"]
        + row["leases_run_out"]
        for row in result["runs"]
        if "nothing" not in row["name"] and (result["resets"] or "daemon" not in row["name"])
    }
    assert [name for name, times in asked.items() if not times] == []


def test_nobody_waits(result: dict[str, Any]) -> None:
    """Conversions around the launch's pages end, and so do updates of memory slots meanwhile."""
    assert result["stuck_threads"] == 0


def test_resets(result: dict[str, Any]) -> None:
    """QEMU 11 launches again ten times; the last boot's stale copies were there each time."""
    if not result["resets"]:
        assert "version 11" in result["resets_reason"]
        return
    assert result["resets"] == 10
    stale = {row["name"]: row["least_stale_before_reset"] for row in result["runs"]}
    for copies in (stale[f"defer both, {disturbance}"] for disturbance in DISTURBANCES):
        assert copies["private"] > 0
        assert copies["shared"] > 0


def test_nothing_leaks_at_a_reset(result: dict[str, Any]) -> None:
    """What the shared file holds after each reset is what stock QEMU's holds, and the ledger."""
    stale = {row["name"]: row["most_stale_pages_after_reset"] for row in result["runs"]}
    assert stale["defer both, nothing"] >= 10 * STALE_PAGES or not result["resets"]
    assert [row["name"] for row in result["runs"] if not row["ledger_is_true"]] == []


def test_where_attributes_are_real(tmp_path: Path) -> None:
    """The same of both kinds on a KVM that converts, nested if need be, with a few resets."""
    results = launch_real(["sev-snp", "tdx"], root_of("newest"), tmp_path, resets=3)
    assert [result["kind"] for result in results if not is_sound(result)] == []
    assert all(result["discards_during_launch"] > 0 for result in results)


@pytest.mark.parametrize("kind", ["sev-snp", "tdx"])
@pytest.mark.parametrize("mode", DEFERS_SHARED)
def test_a_discard_during_a_reset_would_be_seen(kind: str, mode: str) -> None:
    """A plugin that obeys during a launch spoils what QEMU writes where the last boot left off."""
    plugin = build_plugin(DISCARDS_DURING_LAUNCH)
    result = launch(kind, root_of("newest"), plugin, f"{mode}, flush")
    assert [row for row in result["runs"] if not row["different_launches"]] == []
    assert all(row["zero_pages"] > 0 for row in result["runs"])


@pytest.mark.parametrize("qemu", ["", "newest"], ids=["distribution", "newest"])
@pytest.mark.parametrize("mode", DEFERS_SHARED)
def test_a_copy_entered_too_soon_would_be_seen(qemu: str, mode: str) -> None:
    """A plugin that enters the launch's own conversions gives the guest zeroes for firmware."""
    plugin = build_plugin(ENTERS_AT_IOCTL)
    result = launch("sev-snp", root_of(qemu), plugin, f"{mode}, flush")
    assert [row for row in result["runs"] if 0 not in row["different_launches"]] == []
    assert all(row["zero_pages"] > 0 for row in result["runs"])


def test_a_thread_that_waits_would_be_seen() -> None:
    """Those who convert around the launch's last page wait for ever, and QEMU's main loop too."""
    result = launch("sev-snp", plugin=build_plugin(WAITS_FOR_QEMU), only="eager, flush")
    assert result["stuck_threads"] > 1
