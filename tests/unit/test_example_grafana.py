# SPDX-License-Identifier: GPL-2.0-or-later
"""The dashboard and the alerts against the metrics that are exported, and Prometheus' own tool."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "grafana"
GOLDEN = (HERE / "golden" / "metrics.txt").read_text(encoding="utf-8")
ALERTS = EXAMPLE / "alerts.yaml"
DASHBOARD = json.loads((EXAMPLE / "dashboard.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [one for one in DASHBOARD["panels"] if one["type"] != "row"]
EXPRESSIONS: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]
UNITS = {"short", "bytes", "Bps", "ops", "percentunit", "s"}
FROM_PROMETHEUS = {"instance", "job"}
"""Labels that a scrape adds."""


def exported() -> dict[str, set[str]]:
    """The labels of each metric that /metrics shows."""
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(qmp_upm_\w+)(\{.*\})? ", GOLDEN, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'[{,](\w+)="', labels))
    return found


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Its exit code, and all that it says."""
    return subprocess.run(
        ["promtool", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_is_whole(panel: dict[str, Any]) -> None:
    """Title, explanation, unit, and queries with a legend on the dashboard's own data source."""
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["expr"]
        assert target["legendFormat"]
        assert target["datasource"]["uid"] == "${datasource}"


def test_panels_lie_side_by_side() -> None:
    """No two overlap, none leaves the 24 columns, and each has a number of its own."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_every_metric_and_label_is_exported() -> None:
    """What the dashboard and the alerts name is in the golden /metrics."""
    metrics = exported()
    variable = DASHBOARD["templating"]["list"][1]["query"]["query"]
    for text in (*EXPRESSIONS, variable, ALERTS.read_text(encoding="utf-8")):
        for name, labels in re.findall(r"\b(qmp_upm_\w+)(?:\{(.*?)\})?", text):
            assert name in metrics, name
            used = set(re.findall(r"(\w+)(?:=~|!=|=)", labels))
            assert used <= metrics[name] | FROM_PROMETHEUS, (name, used)
    assert re.fullmatch(r"label_values\(qmp_upm_vm_up, domain\)", variable)


def test_grouping_is_by_labels_of_the_metric() -> None:
    """A 'by' or a legend on a label that the metric lacks would show one line without a name."""
    metrics = exported()
    for panel in PANELS:
        for target in panel["targets"]:
            has = set.union(*(metrics[name] for name in re.findall(r"qmp_upm_\w+", target["expr"])))
            by = re.findall(r"by \((.*?)\)", target["expr"])
            for group in by:
                assert set(group.split(", ")) <= has | FROM_PROMETHEUS, target["expr"]
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            left = set(by[-1].split(", ")) if by else has
            assert shown <= left, target["legendFormat"]


def test_expressions_are_promql(tmp_path: Path) -> None:
    """Each is one when Grafana has put its variables in; as rules, promtool reads them."""
    rules = "".join(
        f"      - record: panel:{number}\n        expr: >-\n          {filled}\n"
        for number, filled in enumerate(
            expression.replace("$__rate_interval", "5m").replace("$domain", ".*")
            for expression in EXPRESSIONS
        )
    )
    file = tmp_path / "rules.yaml"
    file.write_text(f"groups:\n  - name: panels\n    rules:\n{rules}", encoding="utf-8")
    result = promtool("check", "rules", file)
    assert result.returncode == 0, result.stdout
    assert f"SUCCESS: {len(EXPRESSIONS)} rules found" in result.stdout
    file.write_text(file.read_text(encoding="utf-8").replace("sum(", "sum((", 1), encoding="utf-8")
    assert promtool("check", "rules", file).returncode != 0


def test_alerts_fire_when_they_should() -> None:
    """None while all is well, each when its trouble comes; and none is left out of that."""
    assert promtool("check", "rules", ALERTS).returncode == 0
    cases = HERE / "promtool" / "alerts.yaml"
    result = promtool("test", "rules", cases)
    assert result.returncode == 0, result.stdout
    text = cases.read_text(encoding="utf-8")
    for alert in re.findall(r"alert: (\w+)", ALERTS.read_text(encoding="utf-8")):
        assert f"alertname: {alert}}}" in text
        assert f'alertname="{alert}"' in text
