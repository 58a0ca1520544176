# SPDX-License-Identifier: GPL-2.0-or-later
"""simulate, calibrate and advise as an operator calls them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from qmp_upm import calibrate
from qmp_upm.configfile import load_config
from qmp_upm.errors import ConfigError
from qmp_upm.prices import load_prices
from qmp_upm.simulator.compare import price
from qmp_upm.simulator.engine import replay
from qmp_upm.simulator.optimum import find_optimum
from qmp_upm.simulator.profiles import PROFILES, find_profile, mail_2022
from qmp_upm.simulator.workloads import WORKLOADS, make_workload
from qmp_upm.trace import TraceWriter
from qmp_upm.units import format_size

KEYS = {
    "policy",
    "profile",
    "cost_seconds",
    "ratio_to_optimum",
    "peak_stale_bytes",
    "mean_stale_bytes",
    "discards",
    "discarded_bytes",
    "reused_bytes",
    "conversions_per_second",
}


FAILING = """
from qmp_upm.policy import Policy

class Failing(Policy):
    def decide(self, batch, *_):
        raise KeyError("oops")
"""


def qmp_upm(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command as installed."""
    program = Path(sys.executable).with_name("qmp-upm")
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ovmf workload, as if it had been recorded every 20 ms under a budget."""
    path = tmp_path_factory.mktemp("trace") / "ovmf.trace"
    records = make_workload("ovmf").records
    with TraceWriter(path, vm="a", policy="eager", budget_bytes=1 << 20) as writer:
        for batch in range(0, int(records["time_ns"][-1]) + 20_000_000, 20_000_000):
            inside = (records["time_ns"] >= batch) & (records["time_ns"] < batch + 20_000_000)
            writer.write(records[inside], batch + 20_000_000)
    return path


def test_simulate_gives_a_list_of_runs() -> None:
    """Every policy of ours at every profile, each with the keys that are promised."""
    result = qmp_upm("simulate", "--workload", "ovmf-pool", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    runs = json.loads(result.stdout)
    assert all(run.keys() >= KEYS for run in runs)
    assert {run["profile"] for run in runs} == set(PROFILES)
    assert {run["policy"] for run in runs} >= {"eager", "lazy", "batched", "eager:copies=none"}
    assert all(run["ratio_to_optimum"] >= 1 for run in runs)


def test_simulate_prints_a_table(trace: Path) -> None:
    """For a trace, some policies and one profile."""
    result = qmp_upm(
        *("simulate", "--trace", str(trace), "--profile", "measured", "--budget", "64 KiB"),
        *("--policy", "lazy:max_age=1 s", "--policy", "eager"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("lazy:max_age=1 s") < result.stdout.rindex("optimum")


def test_a_policy_that_fails_is_contained(tmp_path: Path) -> None:
    """Its guest goes on with eager, as in the daemon: no traceback, and it is said once."""
    (tmp_path / "failing.py").write_text(FAILING)
    info = tmp_path / "failing-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[qmp_upm.policies]\nfailing = failing:Failing\n")
    arguments = ("simulate", "--workload", "ovmf-pool", "--policy", "failing", "--policy", "eager")
    result = qmp_upm(*arguments, "--json", PYTHONPATH=str(tmp_path))
    failing, eager = (
        {run["profile"]: run for run in json.loads(result.stdout) if run["policy"] == name}
        for name in ("failing", "eager")
    )
    assert (result.returncode, result.stderr.count("the policy failing failed")) == (0, 1)
    for profile, run in failing.items():
        assert (run["fallen_back"], eager[profile]["fallen_back"]) == ("KeyError('oops')", None)
        assert run["cost_seconds"] == eager[profile]["cost_seconds"]
    assert "failing (failed)" in qmp_upm(*arguments, PYTHONPATH=str(tmp_path)).stdout


def test_a_trace_brings_its_budget(trace: Path) -> None:
    """What was recorded under a budget is simulated under it, unless another is given."""
    never = ("--policy", "eager:copies=none", "--profile", "free", "--json")
    recorded = json.loads(qmp_upm("simulate", "--trace", str(trace), *never).stdout)[0]
    given = qmp_upm("simulate", "--trace", str(trace), *never, "--budget", "32 KiB").stdout
    assert 0 < json.loads(given)[0]["peak_stale_bytes"] <= 32 << 10
    assert 32 << 10 < recorded["peak_stale_bytes"] <= 1 << 20


def test_a_torn_trace_is_simulated_with_a_note(trace: Path, tmp_path: Path) -> None:
    """What is whole of it."""
    torn = tmp_path / "torn.trace"
    torn.write_bytes(trace.read_bytes()[:-5])
    result = qmp_upm("simulate", "--trace", str(torn), "--profile", "free", "--json")
    assert result.returncode == 0
    assert "torn" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--workload"),
        (["--workload", "ovmf", "--trace", "x"], "either"),
        (["--workload", "windows"], "ovmf-pool"),
        (["--workload", "ovmf", "--policy", "lasy"], "installed policies"),
        (["--workload", "ovmf", "--policy", "lazy:max_age"], "key=value"),
        (["--workload", "ovmf", "--policy", "lazy:max_age=soon"], "max_age"),
        (["--workload", "ovmf", "--profile", "cheap"], "mail-2022"),
        (["--workload", "ovmf", "--profile", "none.toml"], "calibrate"),
        (["--workload", "ovmf", "--budget", "much"], "64 MiB"),
        (["--workload", "ovmf", "--budget", "-1"], "64 MiB"),
        (["--trace", "/nonexistent"], "No such file"),
        (["--trace", "/dev/null"], "no trace"),
        (["--workload", "swiotlb", "--report", "/proc/no/report.html"], "another place"),
    ],
)
def test_bad_input_has_a_hint(arguments: list[str], word: str) -> None:
    """An error with a hint, never a traceback."""
    result = qmp_upm("simulate", *arguments)
    assert result.returncode in (1, 78)
    assert word in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr


def test_report_is_one_file_and_plots_are_png(tmp_path: Path) -> None:
    """Nothing in the page is fetched from elsewhere."""
    page, plots = tmp_path / "r.html", tmp_path / "plots"
    result = qmp_upm(
        *("simulate", "--workload", "ovmf-pool", "--profile", "measured"),
        *("--report", str(page), "--plot", str(plots)),
    )
    assert result.returncode == 0, result.stderr
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 2
    assert "http" not in html
    assert sorted(p.name for p in plots.iterdir()) == [
        "frontier-measured.png",
        "stale-measured.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in plots.iterdir())


def test_calibrate_writes_what_simulate_takes(tmp_path: Path) -> None:
    """This host's prices, as a profile."""
    path = tmp_path / "prices.toml"
    result = qmp_upm("calibrate", "--rounds", "4", "-o", str(path))
    assert result.returncode == 0, result.stderr
    prices = load_prices(path)
    assert prices.discard_call + prices.discard_page > 0
    simulated = qmp_upm("simulate", "--workload", "swiotlb", "--profile", str(path), "--json")
    assert {run["profile"] for run in json.loads(simulated.stdout)} == {str(path)}


def test_calibrate_says_where_it_cannot_write() -> None:
    """With a hint."""
    result = qmp_upm("calibrate", "--rounds", "4", "-o", "/proc/none/prices.toml")
    assert (result.returncode, "hint: " in result.stderr) == (1, True)


def test_calibrate_fits_prices_from_known_values() -> None:
    """A call of 5 µs and a page of 1 µs are found in values that follow them."""
    values = {
        pages: calibrate.np.array([[5e-6 + pages * 1e-6, 3e-6]] * 5) for pages in calibrate.SIZES
    }
    fit = calibrate._fit(values)
    assert (fit.call_s, fit.page_s) == (pytest.approx(5e-6), pytest.approx(1e-6))
    assert (fit.refault_s, fit.spread) == (pytest.approx(3e-6), pytest.approx(0))


def test_calibrate_gives_the_pages_back() -> None:
    """It really punches: what was discarded has to be faulted in again."""
    fits = calibrate.measure(4, Random(1), time.perf_counter_ns)  # noqa: S311 - an order of turns
    assert "memfd" in fits
    assert all(fit.refault_s > 0 for fit in fits.values())


def test_mail_profile_gives_the_boot_times() -> None:
    """The three times of the mail come out of its prices, for its conversions."""
    prices, transactions = mail_2022(), 5100
    discard = prices.discard_call + prices.discard_page + prices.refault_page
    base = 32 + 2 * transactions * prices.conversion
    assert base + 2 * transactions * discard == pytest.approx(103)
    assert base + transactions * discard == pytest.approx(68)


@pytest.mark.parametrize(
    "text",
    ["", "[prices]\n", "[prices]\nconversion = -1\n", "not toml", "prices = 3\n"],
    ids=range(5),
)
def test_bad_price_files_have_a_hint(tmp_path: Path, text: str) -> None:
    """The file is named, and what writes one."""
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.toml") as caught:
        find_profile(str(path))
    assert "calibrate" in caught.value.hint


def test_every_workload_says_what_it_is() -> None:
    """For the list that an operator chooses from."""
    assert all(workload.summary for workload in WORKLOADS.values())


def test_advise_explains_itself(trace: Path) -> None:
    """The policy as a line of configuration, what it saves and holds, and how sure that is."""
    result = qmp_upm("advise", "--trace", str(trace))
    assert result.returncode == 0, result.stderr
    for word in ("policy = { name =", "saves", "holds", "draws from 12 windows"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("workload", "profile"),
    [("balloon", "mail-2022"), ("ovmf", "measured"), ("ovmf-pool", "file"), ("swiotlb", "free")],
)
def test_what_advise_prints_gives_what_it_promises(
    tmp_path: Path, workload: str, profile: str
) -> None:
    """Its lines, pasted into a configuration that is then loaded, cost and hold what it says."""
    prices = find_profile("mail-2022" if profile == "file" else profile)
    if profile == "file":
        profile = str(tmp_path / "prices.toml")
        lines = (f"{name} = {price!r}" for name, price in prices.model_dump().items())
        Path(profile).write_text("\n".join(["[prices]", *lines]))
    result = qmp_upm("advise", "--workload", workload, "--profile", profile)
    assert result.returncode == 0, result.stderr
    lines = [line.strip() for line in result.stdout.splitlines()]
    pasted = [line for line in lines if line.startswith(("policy = ", "budget = "))]
    (costs,) = (line for line in lines if line.startswith("costs "))
    (holds,) = (line for line in lines if line.startswith("holds "))
    file = tmp_path / "config.toml"
    head = ['discovery = ["/x"]', "[telemetry]", f'directory = "{tmp_path}"', "[defaults]"]
    file.write_text("\n".join([*head, *pasted]))
    settings = load_config(file).defaults
    timeline = make_workload(workload, 0)
    outcome = replay(timeline, settings.policy.make(), settings.budget, prices)
    run = price("", "", outcome, prices, find_optimum(timeline, prices))
    assert costs.split()[1] == f"{run.ratio_to_optimum or 1:.2f}"
    assert f"{format_size(outcome.peak_stale_bytes)} at most" in holds
    assert outcome.peak_stale_bytes <= settings.budget


def test_advise_gives_json(trace: Path) -> None:
    """An advice for each profile: free discards are made at once, dear ones are not."""
    arguments = ("--profile", "free", "--profile", "mail-2022", "--json")
    result = qmp_upm("advise", "--trace", str(trace), *arguments)
    free, dear = json.loads(result.stdout)
    assert (free["policy"], free["saved_seconds"], free["mean_stale_bytes"]) == ("eager", 0, 0)
    assert dear["policy"] != "eager"
    assert dear["saved_seconds"] > 60
    assert dear["verdict"] in ("sure", "likely", "unsure")
    assert 0 <= dear["support"]["bootstrap"] <= 1 <= dear["support"]["halves"]


def test_advise_refuses_what_is_no_trace() -> None:
    """With a hint."""
    result = qmp_upm("advise", "--trace", "/dev/null")
    assert (result.returncode, "hint: " in result.stderr) == (1, True)
