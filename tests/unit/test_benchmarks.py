# SPDX-License-Identifier: GPL-2.0-or-later
"""From raw measurements to results.json and RESULTS.md; the figures here are made up."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as bench
from benchmarks import confidential
from benchmarks.reduce import guest_rows, mean_until, native_rows
from benchmarks.results import Results, targets
from qmp_upm.units import format_size
from tests.lab.build import LabError
from tests.lab.firmware import disk_requests
from tests.lab.rows import NONE, STOCK, daemon_config, in_turn, rows
from tests.lab.table import Sample

GIB = 1 << 30
NAMES = ("one backing", STOCK, "eager, plugin", NONE, "lazy", "adaptive")
WORK = dict(zip(NAMES, (100, 2000, 2020, 1000, 1010, 1030), strict=True))
HELD = dict(zip(NAMES, (0, 0, 0, 1000, 500, 50), strict=True))


def guest_round(number: int) -> dict[str, Any]:
    """Each row works WORK ms and then holds HELD bytes; a round is that much slower."""
    made = []
    for name in NAMES:
        work = WORK[name] * (number + 1) / 1000
        samples = [
            [5.0, 0, 0, 0, 0, 0, 0, 0],
            [5.0 + work, int(work * 1e9), 7_000_000, HELD[name], 0, 10, 20, 30],
            [45.0, int(work * 1e9), 8_000_000, HELD[name], 0, 10, 20, 30],
        ]
        raw = {
            "row": name,
            "guest": {"cycles": int(work * 2e9), "errors": 0},
            "done_s": 5.0 + work,
            "exits": {"exits": 5, "hypercalls": 3, "pf_taken": 2},
            "samples": samples,
            "sample_fields": list(Sample.__dataclass_fields__),
        }
        if name not in ("one backing", STOCK):
            raw["peak_stale_bytes"] = HELD[name]
            raw["counters"] = {"discards": 4, "reused-bytes-shared": 1, "reused-bytes-private": 2}
        made.append(raw)
    return {"rows": made, "idle_seconds": 30.0, "processors": 1, "budget_bytes": GIB}


def native_round(number: int) -> dict[str, Any]:
    """One turn of two sizes for each row."""
    return {
        "rows": [
            {
                "row": name,
                "boot": {"cpu_ns": WORK[name] * (number + 1)},
                "peak_stale_bytes": HELD[name],
                "samples": [[0.0, 0], [1.0, HELD[name]], [20.0, HELD[name]]],
                "turns": [
                    {
                        "pages": pages,
                        "threads": 1,
                        "trips": 10,
                        "total_ns": 20 * WORK[name],
                        "cpu_ns": 10 * pages * (WORK[name] + number),
                        "convert_ns": 5 * WORK[name],
                        "faults": 20,
                        "punches": 10,
                    }
                    for pages in (1, 8)
                ],
            }
            for name in NAMES
        ],
        "idle_seconds": 20.0,
    }


@pytest.fixture
def raw() -> dict[str, Any]:
    """Three rounds of both levels, and a boot of a firmware."""
    return {
        "machine": {
            "date": "2026-01-02T03:04:05+00:00",
            "processor": "none",
            "processors": 2,
            "memory_bytes": GIB,
            "kernel": "6.18",
            "qemu": "10.0",
            "plugin": "0",
            "commit": "0",
            "guest_kvm": "none",
            "load": 0.0,
            "seconds": 1,
        },
        "guest": [guest_round(n) for n in range(3)],
        "native": [native_round(n) for n in range(3)],
        "firmware": [
            {
                "where": "nowhere",
                "firmware": "OVMF",
                "linux": "[    0.0] Linux version 6.1 (x)",
                "reached": ["firmware"],
                "seconds": 3.0,
                "conversions": 0,
                "traced_conversions": 0,
                "firmware_reads": [512, 65536],
                "kernel_reads": [4096],
                "network": True,
            }
        ],
        "prices": [],
    }


def test_mean_is_over_the_window() -> None:
    """A sampled quantity is integrated straight between samples, and cut at the window's end."""
    assert mean_until([0, 1, 3], [0, 10, 10], 2) == pytest.approx(7.5)
    assert mean_until([0, 4], [0, 8], 2) == pytest.approx(2)


def test_guest_ratios(raw: dict[str, Any]) -> None:
    """Time and memory of each row, to none's of the same round; a slower round changes neither."""
    found = {row.row: row for row in guest_rows(raw["guest"])}
    assert tuple(found) == NAMES
    assert found["lazy"].time_ratio_to_none == pytest.approx(1.01)
    assert found["eager, plugin"].time_ratio_to_stock == pytest.approx(1.01)
    assert found["lazy"].spread == pytest.approx(0, abs=1e-4)
    assert found[NONE].mean_stale_ratio_to_none == 1
    assert found["adaptive"].mean_stale_ratio_to_none == pytest.approx(0.05, rel=0.01)
    assert found[NONE].peak_stale_bytes == HELD[NONE]
    assert found["lazy"].host_end_bytes == 60
    assert found[STOCK].discards == 0
    assert found["lazy"].reused_bytes == 3


def test_a_machine_with_processors_to_spare_is_timed_by_its_guest(raw: dict[str, Any]) -> None:
    """There the guest's own cycles are its time."""
    for part in raw["guest"]:
        part["processors"] = 2
        part["rows"][-1]["guest"]["cycles"] *= 2
    found = {row.row: row for row in guest_rows(raw["guest"])}
    assert found["adaptive"].time_ratio_to_none == pytest.approx(2.06)


def test_native_ratios(raw: dict[str, Any]) -> None:
    """The table's figure is the smallest range with one thread; others stand under flips."""
    found = {row.row: row for row in native_rows(raw["native"])}
    assert found["lazy"].time_ratio_to_none == pytest.approx(1011 / 1001, abs=1e-4)
    assert found["lazy"].spread == pytest.approx(1010 / 1000 - 1012 / 1002, abs=1e-4)
    assert [(f.pages, f.us) for f in found[NONE].flips] == [(1, 1.001), (8, 8.008)]
    assert found[NONE].flips[0].punches == 1
    assert found["lazy"].mean_stale_ratio_to_none == pytest.approx(0.5)


def test_targets_are_judged(raw: dict[str, Any]) -> None:
    """Met, missed, and not there are three things."""
    found = targets(guest_rows(raw["guest"]), native_rows(raw["native"]))
    judged = {t.what: t.met for t in found}
    assert judged["guest: time_ratio_to_none of lazy"] is True
    assert judged["guest: time_ratio_to_none of adaptive"] is False
    assert judged["guest: time_ratio_to_none of batched"] is None
    assert judged["native: mean_stale_ratio_to_none of adaptive"] is True


def test_report_is_written_from_raw(raw: dict[str, Any], tmp_path: Path) -> None:
    """results.json reads back as its model; RESULTS.md has every row and shows its plots."""
    bench.write(raw, tmp_path)
    text = (tmp_path / "results.json").read_text()
    results = Results.model_validate_json(text)
    for level in (results.guest, results.native):
        assert [row.row for row in level] == list(NAMES)
    wanted = {
        "row",
        "time_ratio_to_none",
        "mean_stale_ratio_to_none",
        "peak_stale_bytes",
        "spread",
    }
    for row in json.loads(text)["guest"] + json.loads(text)["native"]:
        assert wanted <= row.keys()
    report = (tmp_path / "RESULTS.md").read_text()
    assert "$" not in report
    for name in NAMES:
        assert report.count(f"\n| {name} |") == 5
    plots = sorted((tmp_path / "plots").iterdir())
    assert [p.stem for p in plots] == ["guest", "native", "stale"]
    for plot in plots:
        assert f"(plots/{plot.name})" in report
        assert plot.stat().st_size < 150_000
    assert results.firmware[0].below_32k == 1


def test_a_part_that_did_not_run_says_so(raw: dict[str, Any], tmp_path: Path) -> None:
    """No empty table, and no picture that is not there."""
    bench.write(raw | {"native": [], "firmware": []}, tmp_path)
    report = (tmp_path / "RESULTS.md").read_text()
    assert report.count("Not run.") == 3
    assert "native.png" not in report


def test_rows_take_turns() -> None:
    """Every round has every row, and begins with another one."""
    orders = [in_turn(number) for number in range(5)]
    assert len({order[0] for order in orders}) == len(orders)
    assert all(set(order) == set(rows()) for order in orders)


def test_daemon_is_given_the_rows_with_a_policy() -> None:
    """Stock and one backing have no daemon; only ours have a budget of the table's."""
    text = daemon_config({row: f"/{row.slug}" for row in rows()}, "/tmp")  # noqa: S108 - not made
    assert "/one-backing" not in text
    assert '[vms.shared-discard-off]\nsocket = "/shared-discard-off"' in text
    assert text.count("budget = 134217728") == sum(row.limited for row in rows())


def test_disk_requests_are_told_apart() -> None:
    """What was read before the device's last reset is the firmware's, the rest the kernel's."""
    reads = "virtio_blk_handle_read vdev 0x1 req 0x2 sector 0 nsectors"
    reset = "virtio_set_status vdev 0x1 val 0"
    trace = f"{reset}\n{reads} 1\n{reads} 8\n{reset}\n{reset}\n{reads} 16\n"
    assert disk_requests(trace) == ([512, 4096], [8192])
    assert disk_requests(f"{reset}\n{reads} 1\n") == ([512], [])


def test_a_host_without_such_vms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """--cgs says what it takes, before anything runs."""
    monkeypatch.setattr(confidential, "vm_types", lambda: 0b11)
    args = argparse.Namespace(cgs="sev-snp-guest", ovmf=None, kernel=None)
    with pytest.raises(LabError, match=r"makes no VM for sev-snp-guest\nhint: "):
        confidential.options(args)


def test_the_readme_tells_what_was_measured() -> None:
    """Its first table is two rows of results.json, and every promise in there is met."""
    root = Path(bench.ROOT)
    results = Results.model_validate_json((root / "benchmarks/results.json").read_bytes())
    rows = {row.row: row for row in results.guest}
    stock, ours, never = rows[STOCK], rows["adaptive"], rows[NONE]
    held, kept = (format_size(row.mean_stale_bytes) for row in (ours, never))
    text = (root / "README.md").read_text(encoding="utf-8")
    assert f"| before: stock QEMU | {stock.time_ratio_to_none:.2f} | 0 B |" in text
    assert f"| after: `adaptive` | {ours.time_ratio_to_none:.2f} | {held}, of never" in text
    assert f"discarding's {kept} |" in text
    assert all(target.met for target in results.targets)
