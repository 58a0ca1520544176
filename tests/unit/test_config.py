# SPDX-License-Identifier: GPL-2.0-or-later
"""Configuration files, telemetry files and the messages of an untrusted QEMU."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qmp_upm import cli
from qmp_upm.configfile import key_lines, load_config, read_config
from qmp_upm.configschema import config_schema
from qmp_upm.errors import ConfigError, MessageError
from qmp_upm.protocol import Read, read_message
from qmp_upm.settings import configured
from qmp_upm.telemetry import read_totals

ROOT = Path(__file__).parents[2]
GOOD = '[telemetry]\ndirectory = "/t"\n[vms.a]\nsocket = "/s"\n'


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.name)
def test_ready_configurations_load(file: Path) -> None:
    """Every file in configs/ is valid."""
    config = load_config(file)
    assert config.static or config.discovery


def test_defaults_reach_every_vm(tmp_path: Path) -> None:
    """[defaults] holds where the VM's own table is silent."""
    file = tmp_path / "c.toml"
    file.write_text(GOOD + 'lease = "9 s"\n[defaults]\nbudget = "1 MiB"\nlease = 2\n')
    vm = load_config(file).settings_of("a")
    assert (vm.budget, vm.lease) == (1 << 20, 9.0)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (GOOD + '[defaults]\npolicy = { name = "lazy", max_aeg = 3 }\n', "defaults.policy.max_aeg"),
        (GOOD + 'match = ["a*"]\n', "'socket' and 'match'"),
        (GOOD + '[vms.b]\nsocket = "/s"\n', "vms.b.socket: /s is the monitor of 'a'"),
        ('[telemetry]\ndirectory = "/t"\n', "no VM"),
        ('discovery = ["x/*"]\n[telemetry]\ndirectory = "/t"\n', "not an absolute path"),
        ("", "telemetry"),
        ("[telemetry", "not TOML"),
        (GOOD + '[metrics]\nlisten = ":9469"\n', "metrics.listen"),
        (GOOD + "bugdet = 1\n", "vms.a.bugdet"),
        (GOOD + 'budget = "1 parsec"\n', "vms.a.budget"),
        (GOOD + "budget = -1\n", "vms.a.budget"),
        (GOOD + 'lease = "nan s"\n', "vms.a.lease"),
        (GOOD + 'policy = { name = "lasy" }\n', "vms.a.policy"),
        (GOOD + '[vms."../x"]\nsocket = "/s"\n', "vms.../x"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, text: str, key: str) -> None:
    """What is wrong, where, and what to do."""
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(file) in caught.value.message
    assert key in caught.value.message
    assert caught.value.hint


def test_errors_name_lines_and_all_are_said(tmp_path: Path) -> None:
    """Each at the line of its own statement, inline tables and long arrays included."""
    file = tmp_path / "c.toml"
    file.write_text(
        "# nothing here\n"
        'discovery = [\n  "/run/*.monitor",\n  7,\n]\n\n'
        '[telemetry]\ndirectory = "/t"\n\n'
        '[vms."a"]\nsocket = "/s"\nbugdet = 1\n[host]\nbudget = """\n1 parsec"""\n'
    )
    problems = {problem.key: problem for problem in read_config(file)[1]}
    assert {key: problem.line for key, problem in problems.items()} == {
        "discovery.1": 2,
        "vms.a.bugdet": 12,
        "host.budget": 14,
    }
    assert problems["vms.a.bugdet"].hint == "did you mean 'budget'?"
    assert str(problems["host.budget"]).startswith(f"{file}:14: host.budget: ")


def test_brackets_in_strings_and_comments_end_nothing() -> None:
    """Statements are told apart as TOML has them."""
    text = (
        'a = ["]", \'[\', # ] [\n  """\n[\\"""]"""]\n'
        "b = '''\n]''' # [\n[t] # ]\n'c]' = { d = \"}\", e = [\n1,\n] }\nf = \"#\"\n"
    )
    assert set(key_lines(text)) == {
        (("a",), 1),
        (("b",), 4),
        (("t",), 6),
        (("t", "c]"), 7),
        (("t", "c]", "d"), 7),
        (("t", "c]", "e"), 7),
        (("t", "f"), 10),
    }


def test_a_long_list_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand names of VMs take as many lines, not as many times as many."""
    read, loads = [], tomllib.loads
    monkeypatch.setattr(tomllib, "loads", lambda text: read.append(len(text)) or loads(text))
    text = "match = [\n" + '  "vm-[0-9]*",\n' * 2000 + "]\nbudget = 1\n"
    assert list(key_lines(text)) == [(("match",), 1), (("budget",), 2003)]
    assert sum(read) == len(text)


@pytest.mark.parametrize(
    ("table", "key"),
    [("host", "discovery_interval"), ("host", "pressure_interval"), ("defaults", "lease")],
)
def test_what_would_never_rest_is_refused(tmp_path: Path, table: str, key: str) -> None:
    """Intervals and leases of microseconds."""
    (tmp_path / "c.toml").write_text(f"{GOOD}[{table}]\n{key} = 1e-6\n")
    with pytest.raises(ConfigError, match=f"{table}.{key}"):
        load_config(tmp_path / "c.toml")


def test_drop_ins_in_name_order(tmp_path: Path) -> None:
    """The last file that has a key counts; a policy is replaced whole; an error names its file."""
    file = tmp_path / "c.toml"
    file.write_text(GOOD + 'policy = { name = "lazy", max_age = "1 s" }\nbudget = "1 MiB"\n')
    drop_ins = tmp_path / "c.toml.d"
    drop_ins.mkdir()
    (drop_ins / "20-b.toml").write_text('\n[vms.a.policy]\nname = "batched"\n')
    (drop_ins / "10-a.toml").write_text('[vms.a]\nbudget = "2 MiB"\nlease = "9 s"\n')
    (drop_ins / "30.txt").write_text("not read")
    config = load_config(file)
    settings = config.settings_of("a")
    assert (settings.budget, settings.lease) == (2 << 20, 9.0)
    assert (settings.policy.name, settings.policy.parameters) == ("batched", {})
    assert {setting.key: setting.source for setting in configured(config, "a")} == {
        "budget": f"{drop_ins / '10-a.toml'}:2 [vms.a]",
        "weight": "built in",
        "lease": f"{drop_ins / '10-a.toml'}:3 [vms.a]",
        "notify": "built in",
        "policy": f"{drop_ins / '20-b.toml'}:2 [vms.a]",
    }
    (drop_ins / "40.toml").write_text("[vms.a]\n\nlease = true\n")
    with pytest.raises(ConfigError, match=r"40\.toml:3: vms\.a\.lease"):
        load_config(file)


def test_tables_for_groups(tmp_path: Path) -> None:
    """Defaults, then groups in their order, then the VM's own table."""
    file = tmp_path / "c.toml"
    file.write_text(
        'discovery = ["/run/*.monitor"]\n[telemetry]\ndirectory = "/t"\n'
        '[vms.web-1]\nbudget = "4 MiB"\n'
        '[vms.web]\nmatch = ["web-*", "www"]\nbudget = "1 MiB"\nlease = "7 s"\nweight = 7\n'
        '[vms.new]\nmatch = ["*-1"]\nlease = "8 s"\n[defaults]\nbudget = "9 MiB"\n'
    )
    config = load_config(file)
    sources = {setting.key: setting.source for setting in configured(config, "web-2")}
    assert sources["notify"] == "built in"
    assert sources["weight"] == f"{file}:10 [vms.web]"
    one, two, other = (config.settings_of(name) for name in ("web-1", "web-2", "db"))
    assert (one.budget, one.lease, one.weight) == (4 << 20, 8.0, 7)
    assert (two.budget, two.lease, two.weight) == (1 << 20, 7.0, 7)
    assert other == config.defaults


def test_schema_is_of_the_models() -> None:
    """It knows units, tables and the parameters of every installed policy."""
    schema = config_schema()
    assert schema["required"] == ["telemetry"]
    budget = schema["$defs"]["VmSettings"]["properties"]["budget"]
    pattern = next(one["pattern"] for one in budget["anyOf"] if "pattern" in one)
    assert re.search(pattern, "64 MiB")
    assert not re.search(pattern, "64 parsec")
    kinds = {
        kind["if"]["properties"]["name"]["const"]: kind["then"]
        for kind in schema["$defs"]["PolicyTable"]["allOf"]
    }
    assert {"eager", "lazy", "batched"} <= kinds.keys()
    assert "max_age" in kinds["lazy"]["properties"]
    assert schema["$defs"]["VmTable"]["properties"]["match"]["description"]


def test_commands_check_and_show(tmp_path: Path) -> None:
    """``config check`` says what is wrong and exits with 78; ``config show`` says what applies."""
    file = tmp_path / "c.toml"
    file.write_text(GOOD + "lease = 2\n")
    runner = CliRunner()
    assert runner.invoke(cli.app, ["config", "check", "--config", str(file)]).exit_code == 0
    shown = runner.invoke(cli.app, ["config", "show", "a", "--config", str(file), "--json"])
    assert {"key": "lease", "value": 2.0, "source": f"{file}:5 [vms.a]"} in json.loads(shown.output)
    plain = runner.invoke(cli.app, ["config", "show", "a", "--config", str(file)])
    assert f"# {file}:5 [vms.a]" in plain.output
    file.write_text(GOOD + "lease = 0\n")
    refused = runner.invoke(cli.app, ["config", "check", "--config", str(file)])
    assert (refused.exit_code, f"{file}:5: vms.a.lease" in refused.output) == (78, True)


def test_torn_telemetry_adds_up(tmp_path: Path) -> None:
    """The half line of a killed daemon is not counted, and not in the way."""
    file = tmp_path / "t.jsonl"
    file.write_text(
        '{"event": "batch", "conversions": 3, "to_private_bytes": 4096, "to_shared_bytes": 8192,'
        ' "deferred_bytes": 0, "dropped": 1}\n'
        '{"event": "discard", "discarded_bytes": 4096, "skipped_bytes": 0}\n{"event": "bat'
    )
    totals = read_totals(file)
    assert (totals["conversions"], totals["dropped"], totals["discarded_bytes"]) == (3, 1, 4096)


@pytest.mark.parametrize(
    "row",
    [
        [1, 0, 4096, 1, 0, 0],
        [1, 0, 4097, 1, 0, 0, 1],
        [1, -4096, 4096, 1, 0, 0, 1],
        [0, 0, 4096, 1, 0, 0, 1],
        [1, 0, 0, 1, 0, 0, 1],
        [1, 1 << 60, 4096, 1, 0, 0, 1],
        [1, 0, 4096, 2, 0, 0, 1],
        [1, 1 << 70, 4096, 1, 0, 0, 1],
        ["1", 0, 4096, 1, 0, 0, 1],
        [True, 0, 4096, 1, 0, 0, 1],
        [1.0, 0, 4096, 1, 0, 0, 1],
        [1, 0, 4096, 1, 0, 0, 1 << 32],
        [1, 0, 4096, 1, 0, 1 << 63, 1],
        [1, [0], 4096, 1, 0, 0, 1],
        [[], 0, 4096, 1, 0, 0, 1],
        {"region": 1},
        None,
    ],
)
def test_lying_records_are_message_errors(row: object) -> None:
    """A record that can't be is refused, by its number, though all others are right."""
    with pytest.raises(MessageError) as caught:
        read_message(Read, {"cursor": 2, "dropped": 0, "records": [[1, 0, 4096, 1, 0, 0, 1], row]})
    assert "row 1" in caught.value.message
    assert caught.value.hint
