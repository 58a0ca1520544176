# SPDX-License-Identifier: GPL-2.0-or-later
"""What is counted of a VM, and how the daemon shows it.

`VmStats` is the session's own: plain, cheap to add to, and where it counts, monotonic for the
daemon's lifetime. `VmView` is an immutable picture for everybody else: the control socket and the
metrics.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from qmp_upm.pages import PAGE_BYTES
from qmp_upm.protocol import Copy
from qmp_upm.records import Records
from qmp_upm.remarks import Remark

BUCKETS = 40
"""Of a latency histogram: bucket ``i`` counts durations below ``2**(i+1)`` ns, not below ``2**i``;
the last one has no upper end. Source: ``histogram_add`` in plugin/worker.c."""
REASONS_MOST = 16
"""Reasons told apart for a VM's discards. A policy's author chooses them; the rest is ``other``."""

REASON_MOST = 64
"""Characters of a reason."""
COUNTERS_MOST = 256
"""Names of counters that are kept of a plugin."""

FEW_DISCARDS = 64
FEW_SECONDS = 0.1
"""Until so many are measured, what they cost is asked for that soon: a policy is waiting for it."""


class State(StrEnum):
    """Where a session is. It stays there between two attempts to attach."""

    CONNECTING = "connecting"
    """Not tried yet, or never answered."""
    ATTACHED = "attached"
    """Served."""
    REFUSED = "refused"
    """QEMU runs without the plugin."""
    BUSY = "busy"
    """The monitor accepts connections and does not greet: another client holds it."""
    SILENT = "silent"
    """QEMU greeted, and then did not answer in time: stopped, or hung."""
    FAULTY = "faulty"
    """It broke the protocol, or contradicted itself."""
    BACKOFF = "backoff"
    """Nobody listens, or the connection broke."""
    STOPPED = "stopped"
    """The daemon has left the VM."""


def bucket_of(duration_ns: int) -> int:
    """The histogram bucket of a duration."""
    return min(max(duration_ns, 1).bit_length() - 1, BUCKETS - 1)


def _by_copy() -> dict[Copy, int]:
    return dict.fromkeys(Copy, 0)


def _by_reason() -> dict[Copy, dict[str, int]]:
    return {copy: {} for copy in Copy}


def _histogram() -> list[int]:
    return [0] * BUCKETS


def _copied(value: Any) -> Any:
    """A counter, or a table of them: ``deepcopy`` takes ten times as long."""
    if isinstance(value, dict):
        return {k: dict(v) if isinstance(v, dict) else v for k, v in value.items()}
    return list(value) if isinstance(value, list) else value


@dataclass(slots=True)
class VmStats:
    """Counters of a session, and the last that the plugin said. Sizes are bytes.

    Counters survive reconnects and restarts of the VM; of the plugin's, which begin again with each
    QEMU, the increments are added up.
    """

    conversions: dict[Copy, int] = field(default_factory=_by_copy)
    """The guest's conversions, by the copy that became live: as the plugin last counted them, and
    what was read since."""
    followed_conversions: int = 0
    """Those that the session has read of: up to date at any time, without what was dropped."""
    converted_bytes: dict[Copy, int] = field(default_factory=_by_copy)
    flips: int = 0
    """Pages that were converted again, in either direction."""
    deferred_bytes: int = 0
    reused_bytes: dict[Copy, int] = field(default_factory=_by_copy)
    """Found again on return, as the plugin counts it."""
    discards: dict[Copy, dict[str, int]] = field(default_factory=_by_reason)
    """Requests that the plugin has finished, by copy and the policy's reason."""
    discarded_bytes: dict[Copy, dict[str, int]] = field(default_factory=_by_reason)
    skipped_bytes: int = 0
    """Asked for, and no longer stale when the plugin came to them."""
    failed_discards: int = 0
    """Requests that the plugin refused, or ended with an error."""
    dropped_records: int = 0
    unlisted_records: int = 0
    """Of regions that QEMU does not list: left out."""
    resyncs: int = 0
    lease_expiries: int = 0
    reconnects: int = 0
    """Times that the session was attached, but for the first."""
    decisions: int = 0
    decision_failures: int = 0
    decision_seconds: float = 0.0
    decision_ns: list[int] = field(default_factory=_histogram)
    lost_lines: int = 0
    """Telemetry lines that there was no room for, or that could not be written."""
    unrecorded: int = 0
    """Records that clients who record the VM were too slow to take."""
    plugin_counters: dict[str, int] = field(default_factory=dict)
    """As x-upm-query names them."""
    convert_ns: list[int] = field(default_factory=_histogram)
    discard_ns: list[int] = field(default_factory=_histogram)
    stale_bytes: dict[Copy, int] = field(default_factory=_by_copy)
    peak_stale_bytes: int = 0
    """Of this QEMU: the most there ever was of both copies together."""
    budget_bytes: int = 0
    """What the VM may hold now; its share where the host's budget is divided."""

    @property
    def discard_calls(self) -> int:
        """Hole punches whose time is known."""
        return sum(self.discard_ns)

    @property
    def discard_seconds(self) -> float:
        """What all discards have taken: each as long as the middle of its bucket."""
        halves_ns = sum((3 << i) * count for i, count in enumerate(self.discard_ns))
        return halves_ns / 2e9

    @property
    def discarded_pages(self) -> int:
        """In those: the policy's, and the plugin's by itself. QEMU's own it does not time."""
        kinds = (f"{kind}-bytes-{copy}" for kind in ("requested", "failsafe") for copy in Copy)
        return sum(self.plugin_counters.get(kind, 0) for kind in kinds) // PAGE_BYTES

    def count_discard(self, copy: Copy, reason: str, discarded: int, skipped: int) -> None:
        """A request that the plugin has finished."""
        known, reason = self.discards[copy], reason[:REASON_MOST]
        if reason not in known and len(known) >= REASONS_MOST:
            reason = "other"
        known[reason] = known.get(reason, 0) + 1
        by_reason = self.discarded_bytes[copy]
        by_reason[reason] = by_reason.get(reason, 0) + discarded
        self.skipped_bytes += skipped

    def count_decision(self, duration_ns: int) -> None:
        """A decision of the policy, and what it took."""
        self.decisions += 1
        self.decision_seconds += duration_ns / 1e9
        self.decision_ns[bucket_of(duration_ns)] += 1

    def snapshot(self) -> "VmStats":
        """A copy that no longer changes."""
        return VmStats(**{one.name: _copied(getattr(self, one.name)) for one in fields(self)})


class Trouble(BaseModel):
    """Why a VM is not served at the moment, and what to do."""

    model_config = ConfigDict(frozen=True)

    error: str
    hint: str


class VmView(BaseModel):
    """A VM as query-vm and the metrics show it."""

    model_config = ConfigDict(frozen=True)

    name: str
    uuid: str | None
    socket: str
    state: State
    since: float
    """When it came into this state, seconds since 1970."""
    trouble: Trouble | None
    qemu_version: str | None
    plugin_version: str | None
    vm_kind: str | None
    policy: str
    parameters: Mapping[str, object]
    fallen_back: str | None
    """Why the policy was replaced by ``eager``; None while it works."""
    budget_bytes: int
    stale_bytes: Mapping[Copy, int]
    remarks: Sequence[Remark] = ()
    """What is not as it should be with the VM's memory; an older daemon does not say."""
    pressure_percent: float = 0.0
    """Of the last ten seconds in which somebody waited for memory, as its policy was told last."""
    stats: VmStats


class PluginTotals:
    """Adds up counters that begin again whenever QEMU does, into ``stats``.

    Conversions that were read since the plugin last told its counters are added to what it told: a
    QEMU may end before it is asked again.
    """

    def __init__(self, stats: VmStats) -> None:
        self.stats = stats
        self._counters: Mapping[str, int] = {}
        self._latencies: dict[str, Sequence[int]] = {}
        self._since: Counter[str] = Counter()
        self._head = 0

    def restarted(self) -> None:
        """What comes next is of another QEMU."""
        totals = self.stats.plugin_counters
        for name, count in self._since.items():
            totals[name] = totals.get(name, 0) + count
        self._since.clear()
        self._counters, self._latencies, self._head = {}, {}, 0

    def follow(self, records: Records, cursor: int) -> None:
        """Records up to number ``cursor`` have been read; what the plugin told has the first."""
        new = records[max(0, self._head - (cursor - len(records))) :]
        new = new[new["count"] > 0]
        for copy in Copy:
            own = new[new["private"] == (copy is Copy.PRIVATE)]
            self._since[f"conversions-to-{copy}"] += int(own["count"].sum())
            self._since[f"converted-bytes-to-{copy}"] += int(own["size"].sum())
        self._show()

    def take(
        self, counters: Mapping[str, int], latencies: Mapping[str, Sequence[int]], head: int = 0
    ) -> None:
        """Add what has come since the last time; a counter that fell has begun again.

        ``head``: the number of the first record that they do not have.
        """
        stats, totals = self.stats, self.stats.plugin_counters
        if any(counters.get(name, 0) < before for name, before in self._counters.items()):
            self.restarted()
        for name, value in counters.items():
            if name in totals or len(totals) < COUNTERS_MOST:
                totals[name] = totals.get(name, 0) + value - self._counters.get(name, 0)
        self._counters, self._head = dict(counters), head
        self._since.clear()
        self._show()
        for copy in Copy:
            stats.reused_bytes[copy] = totals.get(f"reused-bytes-{copy}", 0)
        stats.deferred_bytes = sum(totals.get(f"deferred-bytes-{copy}", 0) for copy in Copy)
        for name, buckets in (("convert", stats.convert_ns), ("discard", stats.discard_ns)):
            self._take_histogram(name, latencies.get(name, ()), buckets)

    def _show(self) -> None:
        """A counter of ours never goes back."""
        for ours, name in (
            (self.stats.conversions, "conversions-to"),
            (self.stats.converted_bytes, "converted-bytes-to"),
        ):
            for copy in Copy:
                key = f"{name}-{copy}"
                now = self.stats.plugin_counters.get(key, 0) + self._since[key]
                ours[copy] = max(ours[copy], now)

    def _take_histogram(self, name: str, now: Sequence[int], buckets: list[int]) -> None:
        before = self._latencies.get(name, ())
        for i, count in enumerate(now[:BUCKETS]):
            buckets[i] += max(0, count - (before[i] if i < len(before) else 0))
        self._latencies[name] = now
