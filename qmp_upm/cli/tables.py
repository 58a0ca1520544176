# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs as a person reads them.

Names and errors come from QEMU: what could steer a terminal is taken out, and nothing is markup.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qmp_upm.protocol import Copy
from qmp_upm.stats import State, VmStats, VmView
from qmp_upm.units import NSEC, format_duration, format_seconds, format_setting, format_size

PLAIN_KINDS = ("none", "default")
"""Kinds of VMs without private memory."""
_CALM = {State.ATTACHED: "green", State.CONNECTING: "dim", State.STOPPED: "dim"}


def plain(text: object, style: str = "") -> Text:
    """Text of which nothing acts on the terminal."""
    return Text("".join(c if c.isprintable() else "\ufffd" for c in str(text)), style)


def new_table(
    texts: Iterable[str], words: Iterable[str] = (), numbers: Iterable[str] = ()
) -> Table:
    """A table without lines. Where there is no room, ``texts`` give way, the others do not."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def state_cell(state: State) -> Text:
    """The state; red if it is trouble."""
    return plain(state, _CALM.get(state, "red"))


def format_count(count: float) -> str:
    """Three digits and a power of a thousand: ``"12"``, ``"4.2k"``, ``"310M"``."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:  # noqa: PLR2004 - would round to four digits
            return f"{count:.1f}{unit}" if unit and count < 99.95 else f"{count:.0f}{unit}"  # noqa: PLR2004
        count /= 1000
    return f"{count:.0f}T"


def reuse_ratio(stats: VmStats) -> float | None:
    """Of the bytes that were kept, those found again, as the plugin counts both; None without."""
    counters = stats.plugin_counters
    kept = sum(counters.get(f"deferred-bytes-{copy}", 0) for copy in Copy)
    return sum(stats.reused_bytes.values()) / kept if kept else None


def format_share(share: float | None) -> str:
    """Percent, or a dash where there is nothing to share."""
    return "-" if share is None else f"{100 * share:.0f} %"


def status(views: Iterable[VmView]) -> RenderableType:
    """A line for each VM, and below them why one is not served as it should be."""
    table = new_table(
        ("NAME",),
        ("STATE", "POLICY"),
        ("BUDGET", "PRIVATE", "SHARED", "CONV", "REUSED", "REUSE"),
    )
    troubles = []
    for view in views:
        table.add_row(
            plain(view.name),
            state_cell(view.state),
            plain(view.policy, "red" if view.fallen_back else ""),
            format_size(view.budget_bytes),
            *(format_size(view.stale_bytes[copy]) for copy in Copy),
            format_count(sum(view.stats.conversions.values())),
            format_size(sum(view.stats.reused_bytes.values())),
            format_share(reuse_ratio(view.stats)),
        )
        troubles += [plain(f"{view.name}: {line}") for line in _troubles(view)]
    return Group(table, *troubles)


def _troubles(view: VmView) -> Iterator[str]:
    if view.trouble is not None:
        yield f"{view.trouble.error}; hint: {view.trouble.hint}"
    if view.state is State.ATTACHED and view.vm_kind in PLAIN_KINDS:
        yield "its memory is not confidential: there is nothing to defer"
    if view.fallen_back is not None:
        yield f"the policy was replaced by eager: {view.fallen_back}"
    for remark in view.remarks:
        yield f"{remark.seen}; hint: {remark.hint}"


def vm(view: VmView, settings: Iterable[Mapping[str, object]], now: float) -> RenderableType:
    """All that is known of one VM. ``settings`` as query-config lists them."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, text in _facts(view, now):
        grid.add_row(name, plain(text))
    table = new_table(("SETTING", "VALUE", "FROM"))
    for setting in settings:
        value = format_setting(str(setting["key"]), setting["value"])
        table.add_row(plain(setting["key"]), plain(value), plain(setting["source"]))
    return Group(grid, "", table) if table.row_count else grid


def _facts(view: VmView, now: float) -> Iterator[tuple[str, str]]:
    stats, stale = view.stats, view.stale_bytes
    yield "name", view.name
    yield "state", f"{view.state} for {format_duration(max(now - view.since, 0))}"
    yield from (("trouble", line) for line in _troubles(view))
    yield "monitor", view.socket
    if view.uuid:
        yield "UUID", view.uuid
    yield "QEMU", f"{view.qemu_version or '-'}, plugin {view.plugin_version or '-'}"
    yield "VM kind", view.vm_kind or "-"
    parameters = format_setting("policy", view.parameters)
    yield "policy", f"{view.policy} ({parameters})" if parameters else view.policy
    total = sum(stale.values())
    used = format_share(total / view.budget_bytes if view.budget_bytes else None)
    yield "budget", f"{format_size(view.budget_bytes)}, used: {used}"
    sides = ", ".join(f"{copy} {format_size(stale[copy])}" for copy in Copy)
    yield "stale", f"{sides}; peak {format_size(stats.peak_stale_bytes)} since QEMU started"
    for copy in Copy:
        yield (
            f"to {copy}",
            f"{stats.conversions[copy]} conversions, {format_size(stats.converted_bytes[copy])}",
        )
    yield "flips", str(stats.flips)
    reused = format_size(sum(stats.reused_bytes.values()))
    yield "reused", f"{reused}, of what was kept: {format_share(reuse_ratio(stats))}"
    for copy in Copy:
        yield f"discards, {copy}", _discards(stats, copy)
    yield (
        "not discarded",
        f"skipped {format_size(stats.skipped_bytes)}, failed requests: "
        + str(stats.failed_discards),
    )
    yield "decisions", f"{stats.decisions}, failed: {stats.decision_failures}"
    yield "time to decide", _times(stats.decision_ns)
    yield "time to convert", _times(stats.convert_ns)
    yield "time to discard", _times(stats.discard_ns)
    yield "lost", f"records {stats.dropped_records}, telemetry lines {stats.lost_lines}"
    yield "resyncs", str(stats.resyncs)
    yield "leases expired", str(stats.lease_expiries)
    yield "reconnects", str(stats.reconnects)


def policies(answer: Iterable[Mapping[str, Any]]) -> RenderableType:
    """What query-policies lists: each with what it does, its parameters and their defaults."""
    table = new_table(("POLICY", "WHAT IT DOES", "PARAMETERS"))
    for policy in answer:
        known = policy.get("parameters", {}).get("properties", {})
        parameters = (
            f"{key} = {schema['default']}" if "default" in schema else key
            for key, schema in known.items()
        )
        summary = policy.get("doc") or policy.get("error") or "-"
        table.add_row(
            plain(policy["name"]), plain(summary.splitlines()[0]), plain(", ".join(parameters))
        )
    return table


def _discards(stats: VmStats, copy: Copy) -> str:
    by_reason = stats.discards[copy]
    total = format_size(sum(stats.discarded_bytes[copy].values()))
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(by_reason.items()))
    return f"{sum(by_reason.values())}, {total}" + (f" ({reasons})" if reasons else "")


def _times(histogram: Sequence[int]) -> str:
    if not any(histogram):
        return "-"
    half, most = (format_seconds(_quantile_ns(histogram, share) / NSEC) for share in (0.5, 0.99))
    return f"half below {half}, 99 % below {most}"


def _quantile_ns(histogram: Sequence[int], share: float) -> int:
    """The end of the bucket in which this share is reached; `qmp_upm.stats.BUCKETS` says which."""
    wanted = share * sum(histogram)
    reached = next(i for i, seen in enumerate(accumulate(histogram)) if seen >= wanted)
    return 1 << (reached + 1)
