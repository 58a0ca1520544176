# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile guests: all processors convert the same pages at once; ranges that cut each other; memory
that is private from the start, and accepted.

Real: KVM's conversions, QEMU (the distribution's, and the newest), the plugin, the daemon where a
policy needs one. The guest checks its contents by itself; `hostile.c` says what it may expect.
"""

from typing import Any

import pytest

from tests.lab import machine, newest, test_lab
from tests.lab.scenario import Scenario

pytestmark = test_lab.pytestmark

QEMUS = ("distribution", "newest")
CONVERTERS = [
    *(
        Scenario(policy=policy, workload=workload, vcpus=4, name=f"{workload}-{policy}")
        for workload in ("race", "matrix")
        for policy in ("direct-eager", "torture")
    ),
    *(
        Scenario(policy="lazy", workload=workload, vcpus=4, budget="4 MiB", name=f"{workload}-lazy")
        for workload in ("race", "matrix")
    ),
]
ACCEPTERS = [
    Scenario(policy="direct-eager", workload="accept", plugin=False, name="accept-stock"),
    *(
        Scenario(policy=policy, workload="accept", name=f"accept-{policy}")
        for policy in ("direct-eager", "direct-defer", "torture")
    ),
]
USED_BYTES = 64 * 4096
"""Of the memory that it has accepted, what the guest then shares and takes back."""
RACES = [s.name for s in CONVERTERS if s.workload == "race"]
DAEMONLESS = [s.name for s in (*CONVERTERS, *ACCEPTERS) if s.plugin and s.policy != "lazy"]

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=QEMUS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All results by the scenario's name, from one boot of the lab with one QEMU."""
    root = "" if request.param == "distribution" else str(newest.root())
    scenarios = [
        Scenario(**(scenario.to_json() | {"qemu_root": root}))
        for scenario in (*CONVERTERS, *ACCEPTERS)
    ]
    found = machine.run_scenarios(scenarios, tmp_path_factory.mktemp("hostile"))
    return {result["name"]: result for result in found}


@pytest.mark.parametrize("name", [s.name for s in (*CONVERTERS, *ACCEPTERS)])
def test_no_data_is_lost(results: Results, name: str) -> None:
    """What stock QEMU would keep is kept: what is settled, what no one converts, what all agree on.

    And QEMU lives, and every processor came to the end of its work.
    """
    assert results[name]["data_errors"] == 0
    assert results[name].get("qemu_alive", True)


@pytest.mark.parametrize("name", [s.name for s in (*CONVERTERS, *ACCEPTERS) if s.plugin])
def test_accounting_closes(results: Results, name: str) -> None:
    """What was deferred was used again, given back, or is still there: to the byte."""
    counters = results[name]["counters"]
    gone = ("reused", "requested", "failsafe", "forgotten")
    for copy in ("private", "shared"):
        deferred = counters[f"deferred-bytes-{copy}"]
        assert deferred == sum(counters[f"{what}-bytes-{copy}"] for what in gone)
    assert results[name]["final_stale_bytes"] == 0


@pytest.mark.parametrize("name", [s.name for s in CONVERTERS])
def test_memory_is_the_hosts_again(results: Results, name: str) -> None:
    """With an empty ledger, what the host holds of shared memory is what the guest has live."""
    result = results[name]
    assert result["shared_allocated_bytes"] == result["shared_live_bytes"]


@pytest.mark.parametrize("name", ["matrix-lazy", "race-lazy"])
def test_budget_holds_under_a_daemon(results: Results, name: str) -> None:
    """However many convert the same pages at once: at most one conversion above it."""
    assert results[name]["peak_stale_bytes"] <= results[name]["budget_bytes"] + (2 << 20)


@pytest.mark.parametrize("name", DAEMONLESS)
def test_budget_holds(results: Results, name: str) -> None:
    """At most one conversion above the largest budget that there had been by then."""
    result = results[name]
    assert result["peak_over_budget_bytes"] <= result["conversion_most_bytes"]


@pytest.mark.parametrize("workload", ["race", "matrix", "accept"])
def test_eager_keeps_nothing(results: Results, workload: str) -> None:
    """Without a client nothing is ever stale, not for a moment: QEMU's own calls are made."""
    assert results[f"{workload}-direct-eager"]["peak_stale_bytes"] == 0


@pytest.mark.parametrize("name", DAEMONLESS)
def test_conversions_are_counted(results: Results, name: str) -> None:
    """Each of the guest's, and where it races those that KVM adds.

    An access that finds a page's state changed under it makes QEMU convert the page back.
    """
    result = results[name]
    if name in RACES:
        assert result["plugin_conversions"] >= result["guest_conversions"]
    else:
        assert result["plugin_conversions"] == result["guest_conversions"]


@pytest.mark.parametrize("name", ["matrix-lazy", "race-lazy"])
def test_the_daemon_sees_them(results: Results, name: str) -> None:
    """Its telemetry adds up to the plugin's counters."""
    result = results[name]
    made = sum(result["counters"][f"conversions-to-{copy}"] for copy in ("private", "shared"))
    assert (result["seen_conversions"], result["dropped_records"]) == (made, 0)
    assert result["telemetry_discarded_bytes"] == result["requested_bytes"]


@pytest.mark.parametrize("policy", ["direct-eager", "direct-defer", "torture"])
def test_acceptance_gives_back_what_stock_does(results: Results, policy: str) -> None:
    """Preallocated memory that was accepted is the host's again, in any mode.

    But for what the guest has used since, and the plugin keeps: that alone is in the ledger.
    """
    stock, result = results["accept-stock"], results[f"accept-{policy}"]
    kept = result["kept_stale_bytes"]["shared"]
    assert result["kept_shared_bytes"] == stock["kept_shared_bytes"] + kept
    assert kept == (USED_BYTES if policy == "direct-defer" else 0) or policy == "torture"
    assert result["peak_stale_bytes"] <= USED_BYTES
    assert result["shared_allocated_bytes"] == stock["shared_allocated_bytes"]
