# SPDX-License-Identifier: GPL-2.0-or-later
"""The doctor before programs that are, or pretend to be, QEMU."""

import re
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmp_upm.doctor import Check, Places, Status
from qmp_upm.doctor import qemu as module
from qmp_upm.doctor.elf import ElfError, exported_names
from qmp_upm.doctor.qemu import NEEDED, check_qemu
from qmp_upm.plugin import plugin_path

ROOT = Path(__file__).parents[2]
ANSWER = (
    '{"id": "plugin", "return": {"version": "9", "protocol": %d, "vm-kind": "default",'
    ' "conversion": "none", "regions": [], "stale": {"private": 0, "shared": 0, "peak": 0},'
    ' "records": {"head": 0, "oldest": 0, "dropped": 0}, "counters": {}}}'
)
HEAD = f"""#!{sys.executable}
import sys
if "--version" in sys.argv:
    print("QEMU emulator version 10.0.2")
    sys.exit(0)
"""


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A KVM device that anybody may open."""
    (tmp_path / "kvm").touch()
    return Places(kvm=tmp_path / "kvm")


def check(directory: Path, places: Places, body: str) -> dict[str, Check]:
    """What is found of a program with this body after its --version."""
    program = directory / "qemu"
    program.write_text(HEAD + body, encoding="utf-8")
    program.chmod(0o755)
    return {found.name: found for found in check_qemu(program, places)}


def test_program_that_answers(tmp_path: Path, places: Places) -> None:
    """Version, plugin and filter are fine; a script's symbols can't be known."""
    found = check(tmp_path, places, f"print({ANSWER % 1!r})")
    assert {name: one.status for name, one in found.items()} == {
        "qemu": Status.OK,
        "symbols": Status.UNKNOWN,
        "plugin": Status.OK,
        "seccomp": Status.OK,
    }


def test_filter_that_kills(tmp_path: Path, places: Places) -> None:
    """A QEMU that answers only without the seccomp filter is a warning."""
    body = f"if '-sandbox' in sys.argv: sys.exit('Bad system call')\nprint({ANSWER % 1!r})"
    found = check(tmp_path, places, body)
    assert (found["plugin"].status, found["seccomp"].status) == (Status.OK, Status.WARN)
    assert "Bad system call" in found["seccomp"].seen


BAD = {
    "another protocol": (f"print({ANSWER % 2!r})", "protocol 2"),
    "the loader's complaint": ("sys.exit('ERROR: ld.so: cannot be preloaded')", "ld.so"),
    "no word": ("", "no word"),
    "an error": ('print(\'{"id": "plugin", "error": {"desc": "not found"}}\')', "not found"),
    "garbage": ("print('[' * 100000 + '{')", "recursion"),
    "half an answer": ('print(\'{"id": "plugin", "return": {}}\')', "malformed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_program_that_does_not(tmp_path: Path, places: Places, kind: str) -> None:
    """Whatever it says instead is quoted, and is a failure with something to do."""
    body, seen = BAD[kind]
    found = check(tmp_path, places, body)["plugin"]
    assert found.status is Status.FAIL
    assert seen in found.seen
    assert found.action


def test_program_that_hangs(
    tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up, and said."""
    monkeypatch.setattr(module, "SECONDS", 1.0)
    found = check(tmp_path, places, "import signal; signal.pause()")["plugin"]
    assert (found.status, "neither answered nor ended" in found.seen) == (Status.FAIL, True)


def test_without_kvm_the_plugin_is_not_tried(tmp_path: Path, places: Places) -> None:
    """It would stay asleep: unknown, not a failure of the plugin's."""
    places.kvm.unlink()
    found = check(tmp_path, places, "sys.exit('must not be started')")
    assert found["plugin"].status is Status.UNKNOWN


@pytest.mark.parametrize("program", ["/nowhere/qemu", "/bin/true"])
def test_what_is_no_qemu(places: Places, program: str) -> None:
    """One finding, and nothing more is tried with it."""
    (found,) = check_qemu(Path(program), places)
    assert (found.name, found.status) == ("qemu", Status.FAIL)


def test_program_that_exports_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that are missing are said, but not those that GLib has."""
    monkeypatch.setattr(module, "NEEDED", ("ioctl", "g_string_free", "no_such_name"))
    found = module._symbols(plugin_path())
    assert found.status is Status.FAIL
    assert found.seen == "QEMU does not export no_such_name"


def test_needed_symbols_are_the_plugin_s() -> None:
    """The list is that of plugin/qemu.c, in its order."""
    source = (ROOT / "plugin" / "qemu.c").read_text(encoding="utf-8")
    table = re.search(r"symbols\[\] = \{\n(.*?)\n\};", source, re.DOTALL)
    assert table is not None
    assert tuple(re.findall(r'\{ "(\w+)",', table[1])) == NEEDED


def test_exported_names_are_what_the_file_defines() -> None:
    """The plugin defines the functions it stands in for, and only uses others."""
    names = exported_names(plugin_path())
    assert {"ioctl", "fallocate64", "madvise", "close", "munmap"} <= names
    assert not {"dlsym", "qmp_register_command", ""} & names


@example(end=1.0, writes=[(47, 128)])
@given(
    end=st.floats(0, 1),
    writes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=16),
)
def test_damaged_program_is_an_error_of_ours(end: float, writes: list[tuple[int, int]]) -> None:
    """Whatever is cut off or overwritten, also in its headers: names, or ElfError."""
    whole = plugin_path().read_bytes()
    content = bytearray(whole[: round(end * len(whole))])
    for where, value in writes:
        at = where % (64 if where % 2 else len(whole))
        if at < len(content):
            content[at] = value
    with NamedTemporaryFile() as file, suppress(ElfError):
        file.write(content)
        file.flush()
        assert "" not in exported_names(Path(file.name))
