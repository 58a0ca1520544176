# SPDX-License-Identifier: GPL-2.0-or-later
"""Configuration files, telemetry files and the messages of an untrusted QEMU."""

from pathlib import Path

import pytest

from qmp_upm.config import load_config
from qmp_upm.errors import ConfigError, MessageError
from qmp_upm.protocol import Read, read_message
from qmp_upm.telemetry import read_totals

ROOT = Path(__file__).parents[2]
GOOD = '[telemetry]\ndirectory = "/t"\n[vms.a]\nsocket = "/s"\n'


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda f: f.name)
def test_ready_configurations_load(file: Path) -> None:
    """Every file in configs/ is valid."""
    assert load_config(file).vms


def test_defaults_reach_every_vm(tmp_path: Path) -> None:
    """[defaults] holds where the VM's own table is silent."""
    file = tmp_path / "c.toml"
    file.write_text(GOOD + 'lease = "9 s"\n[defaults]\nbudget = "1 MiB"\nlease = 2\n')
    vm = load_config(file).vms["a"]
    assert (vm.budget, vm.lease) == (1 << 20, 9.0)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "telemetry"),
        ("[telemetry", "not TOML"),
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
