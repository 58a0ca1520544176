# SPDX-License-Identifier: GPL-2.0-or-later
"""What Prometheus is told of each VM and of the daemon: names, meanings, and where values are from.

One entry of `VM_FAMILIES` is one metric. Label values are of small, fixed sets, but for the VM's
name and the reasons of its policy's discards, which stats.py bounds: what a QEMU says of itself can
not make new series without end. Durations are seconds, sizes bytes.
"""

import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import Metric

import qmp_upm
from qmp_upm.families import PREFIX, Family, Histogram, Values, single
from qmp_upm.host import ReloadState
from qmp_upm.looplag import BOUNDS_SECONDS, LoopLag
from qmp_upm.protocol import Copy
from qmp_upm.stats import State, VmView
from qmp_upm.supervision import TASKS
from qmp_upm.units import NSEC

LATENCY_POWERS = range(8, 32, 2)
"""Upper ends of latency buckets, as powers of two of a nanosecond: 256 ns to 1.07 s. The plugin and
the session count by every power; a quarter as many series tell as much."""
FATES = ("deferred", "inline", "reused", "requested", "failsafe", "superseded", "forgotten")
"""What the plugin counts bytes by, for each copy; its counters are ``<fate>-bytes-<copy>``."""

_RELEASE = re.compile(r"\d{1,2}\.\d{1,2}")
_VM_KINDS = frozenset({"none", "default", "sw-protected", "sev", "sev-es", "sev-snp", "tdx"})

_LATENCY_ENDS = [2**power / NSEC for power in LATENCY_POWERS]


def _latency(buckets: Sequence[int], sum_seconds: float | None = None) -> Histogram:
    """Of counts by power of two: bucket i is of durations from 2^i to below 2^(i+1) ns."""
    cumulative = list(accumulate(buckets))
    counts = [cumulative[power - 1] for power in LATENCY_POWERS]
    return Histogram(_LATENCY_ENDS, [*counts, cumulative[-1]], sum_seconds)


def _by_copy(values: Mapping[Copy, int]) -> Values:
    return {(copy.value,): values[copy] for copy in Copy}


def _by_reason(values: Mapping[Copy, Mapping[str, int]]) -> Values:
    return {(copy.value, reason): n for copy in Copy for reason, n in values[copy].items()}


def _fates(vm: VmView) -> Values:
    counters = vm.stats.plugin_counters
    return {
        (copy.value, fate): counters.get(f"{fate}-bytes-{copy}", 0)
        for copy in Copy
        for fate in FATES
    }


def _info(vm: VmView) -> Values:
    release = _RELEASE.match(vm.qemu_version or "")
    kind = vm.vm_kind if vm.vm_kind in _VM_KINDS else "unknown"
    return {(vm.policy, release[0] if release else "unknown", str(kind), vm.uuid or ""): 1}


VM_FAMILIES = (
    Family(
        "gauge",
        "vm_up",
        "1 if the VM is served, 0 if not; vm_state says why.",
        lambda vm: float(vm.state is State.ATTACHED),
    ),
    Family(
        "gauge",
        "vm_state",
        "1 for the state that the session with the VM is in.",
        lambda vm: {(state.value,): float(state is vm.state) for state in State},
        ("state",),
    ),
    Family(
        "gauge",
        "vm_info",
        "Always 1: the VM's policy, its QEMU's release, its kind and its UUID.",
        _info,
        ("policy", "qemu", "kind", "uuid"),
    ),
    Family(
        "counter",
        "conversions",
        "Conversions that the guest made, by the copy that became live.",
        lambda vm: _by_copy(vm.stats.conversions),
        ("to",),
    ),
    Family(
        "counter",
        "converted_bytes",
        "Bytes that the guest converted, by the copy that became live.",
        lambda vm: _by_copy(vm.stats.converted_bytes),
        ("to",),
    ),
    Family(
        "counter",
        "flips",
        "Pages that the guest converted again, in either direction.",
        lambda vm: vm.stats.flips,
    ),
    Family(
        "counter",
        "reused_bytes",
        "Bytes whose copy was still there when the guest returned to it.",
        lambda vm: _by_copy(vm.stats.reused_bytes),
        ("copy",),
    ),
    Family(
        "counter",
        "discards",
        "Discard requests that the plugin has finished, by the policy's reason.",
        lambda vm: _by_reason(vm.stats.discards),
        ("copy", "reason"),
    ),
    Family(
        "counter",
        "discarded_bytes",
        "Bytes given back to the host at the daemon's request, by the policy's reason.",
        lambda vm: _by_reason(vm.stats.discarded_bytes),
        ("copy", "reason"),
    ),
    Family(
        "counter",
        "skipped_bytes",
        "Bytes of discard requests that were no longer stale when the plugin came to them.",
        lambda vm: vm.stats.skipped_bytes,
    ),
    Family(
        "counter",
        "failed_discards",
        "Discard requests that the plugin refused or ended with an error.",
        lambda vm: vm.stats.failed_discards,
    ),
    Family(
        "counter",
        "plugin_bytes",
        "What became of stale copies, as the plugin counts: deferred is the sum of reused, "
        "requested, failsafe, superseded, forgotten and of what is stale now; inline are QEMU's "
        "own discards.",
        _fates,
        ("copy", "fate"),
    ),
    Family(
        "counter",
        "over_budget_bytes",
        "Bytes that would have been deferred but for the budget.",
        lambda vm: vm.stats.plugin_counters.get("over-budget-bytes", 0),
    ),
    Family(
        "counter",
        "left_alone_bytes",
        "Bytes converted in memory that has no second copy to discard, such as huge pages.",
        lambda vm: vm.stats.plugin_counters.get("left-alone-bytes", 0),
    ),
    Family(
        "gauge",
        "stale_bytes",
        "Stale copies that the VM holds.",
        lambda vm: _by_copy(vm.stale_bytes),
        ("copy",),
    ),
    Family(
        "gauge",
        "peak_stale_bytes",
        "The most stale bytes, of both copies, that the VM has held since its QEMU started.",
        lambda vm: vm.stats.peak_stale_bytes,
    ),
    Family(
        "gauge",
        "budget_bytes",
        "The most stale bytes that the VM may hold.",
        lambda vm: vm.budget_bytes,
    ),
    Family(
        "gauge",
        "pressure_ratio",
        "Share of time in which somebody waited for memory, as the VM's policy was told last.",
        lambda vm: vm.pressure_percent / 100,
    ),
    Family(
        "counter",
        "dropped_records",
        "Records of conversions that the plugin overwrote before they were read.",
        lambda vm: vm.stats.dropped_records,
    ),
    Family(
        "counter",
        "unlisted_records",
        "Records of conversions in memory that QEMU does not list, which were left out.",
        lambda vm: vm.stats.unlisted_records,
    ),
    Family(
        "counter",
        "resyncs",
        "Times that the plugin's whole ledger was read.",
        lambda vm: vm.stats.resyncs,
    ),
    Family(
        "counter",
        "lease_expiries",
        "Times that the plugin went on without the daemon, which was too slow or away.",
        lambda vm: vm.stats.lease_expiries,
    ),
    Family(
        "counter",
        "reconnects",
        "Times that the VM was attached again.",
        lambda vm: vm.stats.reconnects,
    ),
    Family(
        "histogram",
        "convert_duration_seconds",
        "What a conversion took in QEMU.",
        lambda vm: _latency(vm.stats.convert_ns),
    ),
    Family(
        "histogram",
        "discard_duration_seconds",
        "What a discard of one chunk took in QEMU.",
        lambda vm: _latency(vm.stats.discard_ns),
    ),
    Family(
        "histogram",
        "policy_decision_duration_seconds",
        "What a decision of the policy took.",
        lambda vm: _latency(vm.stats.decision_ns, vm.stats.decision_seconds),
    ),
    Family(
        "counter",
        "policy_failures",
        "Decisions that raised, or were none.",
        lambda vm: vm.stats.decision_failures,
    ),
    Family(
        "gauge",
        "policy_fallen_back",
        "1 if the policy failed and the VM is served by eager instead.",
        lambda vm: float(vm.fallen_back is not None),
    ),
    Family(
        "counter",
        "telemetry_lost_lines",
        "Lines of telemetry that the disk was too slow or too full for.",
        lambda vm: vm.stats.lost_lines,
    ),
    Family(
        "counter",
        "unrecorded_records",
        "Records of conversions that 'qmp-upm record' was too slow to take.",
        lambda vm: vm.stats.unrecorded,
    ),
)


@dataclass(frozen=True)
class DaemonFigures:
    """What is told of the daemon itself. ``task_deaths``: by kind of task."""

    reload: ReloadState
    lag: LoopLag
    evicted_bytes: int
    lost_log_lines: int
    task_deaths: Mapping[str, int]


def daemon_metrics(figures: DaemonFigures) -> Iterator[Metric]:
    """Those of the daemon itself."""
    yield single(
        "gauge",
        "build_info",
        "Always 1: the release of qmp-upm, and of Python.",
        1,
        version=qmp_upm.__version__,
        python=platform.python_version(),
    )
    yield single(
        "gauge",
        "config_last_reload_successful",
        "1 if the last attempt to load the configuration succeeded.",
        float(figures.reload.successful),
    )
    yield single(
        "gauge",
        "config_last_reload_success_timestamp_seconds",
        "When the configuration was last loaded, since 1970.",
        figures.reload.time,
    )
    yield single(
        "histogram",
        "event_loop_lag_seconds",
        "How late a timer of the event loop was.",
        Histogram(BOUNDS_SECONDS, list(accumulate(figures.lag.counts)), figures.lag.total_seconds),
    )
    yield single(
        "counter",
        "telemetry_evicted_bytes",
        "Bytes of old telemetry that were deleted to keep the cap.",
        figures.evicted_bytes,
    )
    yield single(
        "counter",
        "log_lost_lines",
        "Lines of the log that stderr was too slow for, or refused.",
        figures.lost_log_lines,
    )
    deaths = Metric(
        f"{PREFIX}task_deaths", "Tasks that died of a defect and were begun again.", "counter"
    )
    for task in TASKS:
        deaths.add_sample(f"{deaths.name}_total", {"task": task}, figures.task_deaths.get(task, 0))
    yield deaths
