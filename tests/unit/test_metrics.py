# SPDX-License-Identifier: GPL-2.0-or-later
"""What Prometheus reads: the whole text as the golden file has it; its own tool is content.

After a change that is meant: ``python tests/unit/test_metrics.py`` writes the golden file anew.
"""

import asyncio
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

import qmp_upm
from qmp_upm.config import Config
from qmp_upm.exposition import FRESH_MOST, FRESH_SECONDS, Exposition, pages
from qmp_upm.host import Host, ReloadState
from qmp_upm.looplag import LoopLag
from qmp_upm.metrics import VM_FAMILIES, DaemonFigures, daemon_metrics
from qmp_upm.protocol import Copy
from qmp_upm.stats import BUCKETS, State, Trouble, VmStats, VmView

GOLDEN = Path(__file__).parent / "golden" / "metrics.txt"
PRIVATE, SHARED = Copy.PRIVATE, Copy.SHARED


def busy_stats() -> VmStats:
    """Every counter is another number, and all have one."""
    stats = VmStats(
        conversions={PRIVATE: 5101, SHARED: 5100},
        converted_bytes={PRIVATE: 66_000_000, SHARED: 65_000_000},
        flips=10_100,
        deferred_bytes=131_000_000,
        reused_bytes={PRIVATE: 33_000_000, SHARED: 34_000_000},
        skipped_bytes=12_288,
        failed_discards=1,
        dropped_records=17,
        resyncs=3,
        lease_expiries=2,
        reconnects=4,
        decision_failures=1,
        lost_lines=23,
        unrecorded=29,
        peak_stale_bytes=2 << 20,
        budget_bytes=256 << 20,
        plugin_counters={
            f"{fate}-bytes-{copy}": 4096 * (10 * i + j)
            for i, fate in enumerate(
                ("deferred", "inline", "reused", "requested", "failsafe", "superseded", "forgotten")
            )
            for j, copy in enumerate(Copy)
        }
        | {"over-budget-bytes": 8192, "left-alone-bytes": 2 << 20, "made-up-by-qemu": 1},
        convert_ns=list(range(BUCKETS)),
        discard_ns=[0] * (BUCKETS - 1) + [1],
    )
    stats.count_discard(PRIVATE, "age", 8192, 4096)
    stats.count_discard(SHARED, "budget", 1 << 20, 0)
    stats.count_discard(SHARED, 'my "own" \\ reason', 4096, 0)
    for duration_ns in (1, 255, 256, 1_000_000, 1 << 50):
        stats.count_decision(duration_ns)
    return stats


def view(name: str, stats: VmStats, **changes: object) -> VmView:
    """A VM that is served, but for the changes."""
    attached = VmView(
        name=name,
        uuid="6a0d6d6a-8a43-4d51-9ac5-3f5d0a1f0a11",
        socket=f"/run/{name}.monitor",
        state=State.ATTACHED,
        since=1_700_000_000,
        trouble=None,
        qemu_version="10.0.2",
        plugin_version="0.1.0",
        vm_kind="sev-snp",
        policy="lazy",
        parameters={"max_age": 10},
        fallen_back=None,
        budget_bytes=256 << 20,
        stale_bytes={PRIVATE: 1 << 20, SHARED: 1 << 19},
        stats=stats,
    )
    return attached.model_copy(update=changes)


VIEWS = [
    view("busy", busy_stats()),
    view(
        "never-seen",
        VmStats(),
        state=State.BACKOFF,
        trouble=Trouble(error="nobody listens", hint="start it"),
        qemu_version=None,
        vm_kind=None,
        fallen_back="KeyError",
        stale_bytes={PRIVATE: 0, SHARED: 0},
    ),
    view("lying", VmStats(), qemu_version='1"}\n', vm_kind="}{", state=State.FAULTY),
]


def exposition(vms: list[VmView], clock: list[float] | None = None) -> Exposition:
    """Of these VMs, and of a daemon that is always the same."""
    lag = LoopLag()
    lag.counts[0], lag.counts[-1], lag.total_seconds = 100, 1, 3.5
    reload = ReloadState(successful=False, time=1_700_000_123.5, error="bad")

    def others() -> Iterator[Metric]:
        yield from daemon_metrics(DaemonFigures(reload, lag, 1 << 20, 3, {"session": 2}))

    time = clock or [0.0]
    return Exposition(lambda: iter(vms), others, lambda: time[0])


def text_of(vms: list[VmView]) -> str:
    """The whole page, of release 1.2.3 on Python 3.99."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qmp_upm, "__version__", "1.2.3")
        patch.setattr(platform, "python_version", lambda: "3.99.0")
        return asyncio.run(exposition(vms).text()).decode()


def test_the_page_is_the_golden_one() -> None:
    """To the letter."""
    assert text_of(VIEWS) == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("vms", [VIEWS, []], ids=["three", "none"])
def test_promtool_is_content(vms: list[VmView]) -> None:
    """Prometheus' own linter has nothing to say."""
    result = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text_of(vms),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_many_vms_make_one_family_each() -> None:
    """Written a few VMs at a time, each metric is declared once and has the samples of all."""
    vms = [view(f"vm{number}", busy_stats()) for number in range(20)]
    text = text_of(vms)
    assert text.count("# HELP qmp_upm_vm_up ") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert len(families) == text.count("# TYPE ")
    for name in VM_FAMILIES:
        domains = {s.labels["domain"] for s in families[f"qmp_upm_{name.name}"].samples}
        assert domains == {vm.name for vm in vms}


def test_latencies_end_where_they_say() -> None:
    """A bucket counts what is shorter than its end, to the nanosecond; the last one counts all."""
    stats = VmStats()
    for duration_ns in (255, 256, 1023, 1024, 1 << 45):
        stats.count_decision(duration_ns)
    lines = text_of([view("vm", stats)]).splitlines()
    name = "qmp_upm_policy_decision_duration_seconds_"
    counts = [line.rpartition(" ")[2] for line in lines if line.startswith(f"{name}bucket")]
    assert counts[:3] + counts[-2:] == ["1.0", "3.0", "4.0", "4.0", "5.0"]
    assert 'le="2.56e-07"' in next(line for line in lines if line.startswith(f"{name}bucket"))


def test_a_picture_stays_as_it_is() -> None:
    """What is counted afterwards, in tables of tables too, is not in it."""
    stats = busy_stats()
    picture, same = stats.snapshot(), busy_stats()
    assert picture == same
    stats.count_discard(PRIVATE, "age", 1, 1)
    stats.count_decision(5)
    stats.conversions[SHARED] += 1
    stats.plugin_counters["over-budget-bytes"] += 1
    stats.convert_ns[0] += 1
    assert picture == same


async def test_others_run_while_the_page_is_written() -> None:
    """Two hundred VMs: the loop goes round hundreds of times before the page is there."""
    made = asyncio.create_task(
        exposition([view(f"vm{number}", VmStats()) for number in range(200)]).text()
    )
    rounds = 0
    while not made.done():
        await asyncio.sleep(0)
        rounds += 1
    assert rounds > 500


async def test_pages_of_a_host(tmp_path: Path) -> None:
    """Alive at once, ready when it says so, and its metrics are those of its sessions."""
    ready = [False]
    config = Config.model_validate({"telemetry": {"directory": tmp_path}, "discovery": ["/x/*"]})
    served = pages(Host(config), LoopLag(), lambda: ready[0])
    assert (await served["/healthz"]()).status == 200
    assert (await served["/readyz"]()).status == 503
    ready[0] = True
    assert (await served["/readyz"]()).status == 200
    text = (await served["/metrics"]()).body.decode()
    assert "\nqmp_upm_config_last_reload_successful 1.0\n" in text
    assert "\nprocess_open_fds " in text
    assert "domain=" not in text


@pytest.mark.parametrize(
    ("took_s", "fresh_s"), [(0.0, FRESH_SECONDS), (0.2, 2.0), (7.0, FRESH_MOST)]
)
async def test_the_page_is_shared(took_s: float, fresh_s: float) -> None:
    """Whoever asks soon enough gets the same text, made once: longer if it was dear."""
    clock, asked = [0.0], 0

    def pictures() -> Iterator[VmView]:
        nonlocal asked
        asked += 1
        clock[0] += took_s
        yield from VIEWS

    page = Exposition(pictures, lambda: (), lambda: clock[0])
    texts = await asyncio.gather(*(page.text() for _ in range(50)))
    assert (asked, len(set(texts))) == (1, 1)
    clock[0] += fresh_s - 0.01
    await page.text()
    assert asked == 1
    clock[0] += 0.02
    await page.text()
    assert asked == 2


if __name__ == "__main__":
    GOLDEN.write_text(text_of(VIEWS), encoding="utf-8")
    sys.exit(0)
