# SPDX-License-Identifier: GPL-2.0-or-later
"""Real conversions: every scenario runs in one boot of the lab, and each promise is a test."""

import json
import os
import platform
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qmp_upm.pages import PAGE_BYTES
from qmp_upm.policy import make_policy
from qmp_upm.protocol import Copy
from qmp_upm.simulator.engine import Outcome, replay
from qmp_upm.simulator.timeline import Timeline
from qmp_upm.telemetry import read_totals
from qmp_upm.trace import read_trace
from qmp_upm.units import NSEC
from tests.lab import machine
from tests.lab.build import TARBALL
from tests.lab.scenario import POLICIES, Scenario

AVAILABLE = (
    platform.machine() == "x86_64"
    and shutil.which("qemu-system-x86_64") is not None
    and (TARBALL.exists() or machine.host_has_vm_type())
)
# On CI a missing lab is a failure of the set-up, not a reason to skip.
pytestmark = pytest.mark.skipif(
    not AVAILABLE and not os.environ.get("CI"),
    reason="needs x86-64, qemu-system-x86_64 and the kernel's source: run 'make test'",
)

SCENARIOS = [
    *(
        Scenario(
            policy=p,
            workload="ovmf",
            flips=2000,
            totals=p == "lazy",
            record=p in ("lazy", "batched"),
            name=f"ovmf-{p}",
        )
        for p in POLICIES
    ),
    *(
        Scenario(policy=p, workload="ovmf", flips=1000, budget="64 KiB", name=f"small-{p}")
        for p in ("lazy", "batched")
    ),
    Scenario(
        policy="none", workload="ovmf", flips=1000, budget="64 KiB", record=True, name="bytes-none"
    ),
    *(
        Scenario(
            policy=f"{p}-bytes", workload="paced", budget="1 MiB", record=True, name=f"bytes-{p}"
        )
        for p in ("lazy", "batched")
    ),
    *(
        Scenario(policy=p, workload="random", vcpus=2, flips=20000, name=f"random-{p}")
        for p in POLICIES
    ),
    Scenario(policy="lazy", workload="swiotlb", budget="128 MiB", name="swiotlb"),
    Scenario(policy="none", workload="flip", flips=1000, name="flip"),
    Scenario(policy="lazy", workload="ovmf", flips=5100, kill_daemon_after=1, name="killed"),
    Scenario(policy="eager", workload="ovmf", flips=500, plugin=False, name="stock"),
    Scenario(policy="none", workload="selftest", name="selftest"),
]
TORTURE = Scenario(policy="torture", workload="random", vcpus=4, flips=4000, name="torture")
WITH_PLUGIN = [s.name for s in SCENARIOS if s.plugin]
FOLLOWED = [s.name for s in SCENARIOS if s.plugin and s.kill_daemon_after is None]
HONEST = [s.name for s in SCENARIOS if s.workload != "selftest"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All results by the scenario's name."""
    found = machine.run_scenarios([*SCENARIOS, TORTURE], tmp_path_factory.mktemp("lab"))
    return {result["name"]: result for result in found}


Results = dict[str, dict[str, Any]]


@pytest.mark.parametrize("name", HONEST)
def test_no_data_is_lost(results: Results, name: str) -> None:
    """What the guest wrote is there until it converts the page, then whole or zeroes."""
    assert results[name]["data_errors"] == 0


def test_the_guest_would_notice(results: Results) -> None:
    """The checker finds what the guest itself corrupts: at once in both copies, and once kept."""
    assert results["selftest"]["data_errors"] == 3


@pytest.mark.parametrize("name", FOLLOWED)
def test_every_conversion_is_seen(results: Results, name: str) -> None:
    """The daemon's telemetry adds up to the guest's own count, and to the plugin's."""
    result = results[name]
    counters = result["counters"]
    assert result["seen_conversions"] == result["guest_conversions"]
    assert result["dropped_records"] == 0
    assert result["guest_conversions"] == (
        counters["conversions-to-private"] + counters["conversions-to-shared"]
    )
    assert result["telemetry_discarded_bytes"] == result["requested_bytes"]


def samples_of(metrics: str) -> dict[tuple[str, ...], float]:
    """By name and labels but for the domain, these in the order of their names."""
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "domain")): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }


def lines_of(result: dict[str, Any], event: str) -> list[dict[str, Any]]:
    """The telemetry's lines of one kind."""
    text = (Path(result["folder"]) / result["telemetry_file"]).read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def test_all_tell_the_same(results: Results) -> None:
    """Control socket, CLI, metrics, telemetry and plugin say what the guest itself has counted."""
    result = results["ovmf-lazy"]
    guest, counters, told = result["guest"], result["counters"], result["told"]
    views, samples = (told["control"], told["cli"]), samples_of(told["metrics"])
    lines = read_totals(Path(result["folder"]) / result["telemetry_file"])
    discards = lines_of(result, "discard")
    for copy in Copy:
        made, converted = guest[f"conversions_to_{copy}"], guest[f"bytes_to_{copy}"]
        assert made > 0
        assert counters[f"conversions-to-{copy}"] == made
        assert samples["qmp_upm_conversions_total", copy] == made
        assert [view["stats"]["conversions"][copy] for view in views] == [made, made]
        assert counters[f"converted-bytes-to-{copy}"] == converted
        assert samples["qmp_upm_converted_bytes_total", copy] == converted
        assert [view["stats"]["converted_bytes"][copy] for view in views] == [converted] * 2
        assert lines[f"to_{copy}_bytes"] == converted
        given = counters[f"requested-bytes-{copy}"]
        assert sum(line["discarded_bytes"] for line in discards if line["copy"] == copy) == given
        for view in views:
            assert sum(view["stats"]["discarded_bytes"][copy].values()) == given
        assert given == sum(
            value
            for key, value in samples.items()
            if key[:2] == ("qmp_upm_discarded_bytes_total", copy)
        )
        reused = counters[f"reused-bytes-{copy}"]
        assert reused > 0
        assert samples["qmp_upm_reused_bytes_total", copy] == reused
        assert [view["stats"]["reused_bytes"][copy] for view in views] == [reused, reused]
        assert samples["qmp_upm_stale_bytes", copy] == 0
        assert [view["stale_bytes"][copy] for view in views] == [0, 0]
    known = [name for name in counters if "-bytes" in name or "conversions" in name]
    for view in views:
        seen = view["stats"]["plugin_counters"]
        assert [seen[name] for name in known] == [counters[name] for name in known]
        assert view["stats"]["followed_conversions"] == guest["conversions"]
    assert guest["conversions"] == sum(guest[f"conversions_to_{copy}"] for copy in Copy)
    assert lines["conversions"] == guest["conversions"]
    assert samples["qmp_upm_convert_duration_seconds_count",] == guest["conversions"]
    assert result["requested_bytes"] == lines["discarded_bytes"] > 0
    assert result["final_stale_bytes"] == 0
    peak = result["peak_stale_bytes"]
    assert samples["qmp_upm_peak_stale_bytes",] == peak > 0
    assert [view["stats"]["peak_stale_bytes"] for view in views] == [peak, peak]
    assert samples["qmp_upm_dropped_records_total",] == lines["dropped"] == 0
    assert [view["stats"]["dropped_records"] for view in views] == [0, 0]
    assert samples["qmp_upm_telemetry_lost_lines_total",] == lines["lost_lines"] == 0


@pytest.mark.parametrize("name", WITH_PLUGIN)
def test_accounting_closes(results: Results, name: str) -> None:
    """What was deferred was used again, given back, or is still there: to the byte."""
    counters = results[name]["counters"]
    left = sum(
        counters[f"{what}-bytes-{copy}"]
        for what in ("reused", "requested", "failsafe", "forgotten")
        for copy in ("private", "shared")
    )
    deferred = sum(counters[f"deferred-bytes-{copy}"] for copy in ("private", "shared"))
    assert deferred == left + results[name]["final_stale_bytes"]


@pytest.mark.parametrize("name", WITH_PLUGIN)
def test_budget_holds(results: Results, name: str) -> None:
    """Stale bytes never pass the budget."""
    result = results[name]
    assert result["max_polled_stale_bytes"] <= result["peak_stale_bytes"]
    assert result["peak_stale_bytes"] <= result["budget_bytes"]


@pytest.mark.parametrize(
    "name", [s.name for s in SCENARIOS if s.plugin and s.policy in ("eager", "lazy", "batched")]
)
def test_nothing_is_kept_for_ever(results: Results, name: str) -> None:
    """Once idle past their age, all stale copies are gone."""
    assert results[name]["final_stale_bytes"] == 0


def test_lazy_and_batched_keep_some(results: Results) -> None:
    """They do defer: copies were held, and used again."""
    for name in ("ovmf-lazy", "ovmf-batched", "small-lazy", "small-batched"):
        assert results[name]["peak_stale_bytes"] > 0
        assert results[name]["reused_bytes"] > 0


def test_none_keeps_everything(results: Results) -> None:
    """No discard at all: the stale copies stay."""
    assert results["ovmf-none"]["discarded_bytes"] == 0
    assert results["ovmf-none"]["final_stale_bytes"] > 0


def test_eager_keeps_nothing(results: Results) -> None:
    """Every copy goes at its conversion."""
    assert results["ovmf-eager"]["peak_stale_bytes"] == 0


def test_killed_daemon_leaves_nothing(results: Results) -> None:
    """SIGKILL: the guest goes on, and after the lease the plugin has given everything back."""
    result = results["killed"]
    assert result["daemon_exit"] == -9
    assert result["counters"]["lease-expiries"] == 1
    assert result["final_stale_bytes"] == 0


@pytest.mark.parametrize("name", FOLLOWED)
def test_sigterm_leaves_fail_safe(results: Results, name: str) -> None:
    """The daemon exits with 0 when told to."""
    assert results[name]["daemon_exit"] == 0


def test_stock_qemu_is_refused_with_a_hint(results: Results) -> None:
    """Without the plugin the guest runs as ever, and the daemon says how to load it."""
    result = results["stock"]
    assert result["guest_conversions"] == 1001
    assert "LD_PRELOAD=" in result["refusal"]


def test_deferring_costs_fewer_cycles(results: Results) -> None:
    """Keeping both copies takes clearly fewer guest cycles than eager: a ratio within one run."""
    assert results["ovmf-none"]["guest_cycles"] < 0.8 * results["ovmf-eager"]["guest_cycles"]


@pytest.mark.parametrize(
    "name", [s.name for s in SCENARIOS if s.policy in ("eager", "lazy", "batched") and s.plugin]
)
def test_the_ledger_is_true(results: Results, name: str) -> None:
    """With an empty ledger, what the host holds of shared memory is what the guest has live."""
    result = results[name]
    assert result["shared_allocated_bytes"] == result["shared_live_bytes"]


def replayed(result: dict[str, Any], quiet_ns: int = 0) -> Outcome:
    """The scenario's trace through the simulator, under the policy that it was recorded with."""
    trace = read_trace(Path(result["folder"]) / result["trace_file"])
    assert (trace.dropped, trace.torn_bytes) == (0, 0)
    header = trace.header
    policy = make_policy(header.policy, header.parameters)
    end_ns = trace.reads[-1].now_ns + quiet_ns
    return replay(Timeline(trace.records, end_ns, trace.reads), policy, header.budget_bytes or 0)


@pytest.mark.parametrize("name", ["bytes-none", "bytes-lazy", "bytes-batched"])
def test_simulator_agrees_to_the_byte(results: Results, name: str) -> None:
    """Where a policy acts on bytes: as many hole punches, the same reuse, and the same peak.

    The guest rests while the policy discards: what it converts before a discard is done is a matter
    of time. Nothing is discarded but what the budget does not hold where the policy is none.
    """
    result = results[name]
    outcome = replayed(result)
    assert outcome.discards == result["discards"] > 0
    assert outcome.discarded_bytes == result["discarded_bytes"]
    assert outcome.account.reused_pages * PAGE_BYTES == result["reused_bytes"] > 0
    assert outcome.peak_stale_bytes == result["peak_stale_bytes"]
    assert outcome.final_stale_bytes == result["final_stale_bytes"]
    assert (result["requested_bytes"] > 0) == (name != "bytes-none")


@pytest.mark.parametrize("name", ["ovmf-lazy", "ovmf-batched"])
def test_simulator_agrees_within_a_tick(results: Results, name: str) -> None:
    """Where it acts on time, too, and the guest goes on: the same bytes are decided on.

    A real discard takes a while. What the guest converts back before it is done is skipped, and
    used again instead: just so much is discarded less, and reused more, than in the simulator. Just
    so long the plugin holds what the simulator has given back; what is converted meanwhile comes
    on top. And what comes of age within a tick is discarded in one go, in fewer punches then;
    ``batched`` has no ages.
    """
    result, decisions = results[name], lines_of(results[name], "decision")
    outcome = replayed(result, 10 * NSEC)
    skipped = sum(line["skipped_bytes"] for line in lines_of(result, "discard"))
    slack = bytes_after_a_pause(outcome)
    saved = outcome.account.requested_calls - sum(line["ranges"] for line in decisions)
    decided = sum(line["bytes"] for line in decisions)
    assert saved == 0 or (saved > 0 and name == "ovmf-lazy") or slack
    assert abs(outcome.account.requested_pages * PAGE_BYTES - decided) <= slack
    assert abs(outcome.discarded_bytes - result["discarded_bytes"] - skipped) <= slack
    reused = outcome.account.reused_pages * PAGE_BYTES
    assert abs(reused - result["reused_bytes"] + skipped) <= slack
    under_way = max(bytes_under_way(result, outcome))
    assert result["peak_stale_bytes"] <= outcome.peak_stale_bytes + under_way + slack
    assert result["peak_stale_bytes"] >= outcome.peak_stale_bytes - skipped - slack
    assert outcome.final_stale_bytes == result["final_stale_bytes"] == 0


def bytes_after_a_pause(outcome: Outcome) -> int:
    """What the guest converted after the policy first discarded while the guest did nothing.

    A daemon that is woken then reads nothing, so that no trace tells when exactly it was, or if the
    guest was back by then. All else is decided at recorded reads. Mostly 0: the guest is done.
    """
    line = outcome.timeline
    pauses_ns = [
        after.now_ns
        for before, after in pairwise(outcome.moments)
        if after.stale_bytes < before.stale_bytes
        and after.now_ns not in {read.now_ns for read in line.reads}
        and not (line.time_ns[read_by(line, after.now_ns) :] <= after.now_ns).any()
    ]
    return int(line.records["size"][line.time_ns > min(pauses_ns, default=line.end_ns)].sum())


def read_by(line: Timeline, now_ns: int) -> int:
    """How many conversions the daemon had read of."""
    return max((read.end for read in line.reads if read.now_ns <= now_ns), default=0)


def bytes_under_way(result: dict[str, Any], outcome: Outcome) -> list[int]:
    """For each discard, the memory that was converted from the read before it until it was done."""
    line = outcome.timeline
    done_ns = {done["id"]: done["mono_ns"] for done in lines_of(result, "discard")}
    totals = []
    for decision in lines_of(result, "decision"):
        low = read_by(line, decision["mono_ns"])
        high = int(np.searchsorted(line.time_ns, done_ns[decision["id"]], side="right"))
        extents = np.unique(line.touch_extent[line.touches(low, high)])
        totals.append(int(line.extents.pages[extents].sum()) * PAGE_BYTES)
    return totals


def test_torture(results: Results) -> None:
    """Four vCPUs, and a client that discards, drains, reconfigures and falls silent at random."""
    result = results["torture"]
    assert result["data_errors"] == 0
    assert result["qemu_alive"]
    assert result["plugin_conversions"] == result["guest_conversions"]
    assert result["over_budget_bytes"] <= result["conversion_most_bytes"]
    assert result["peak_over_budget_bytes"] <= result["conversion_most_bytes"]
    assert result["final_stale_bytes"] == 0
    assert result["shared_allocated_bytes"] == result["shared_live_bytes"]
    assert sum(result["disturbances"].values()) > 5
