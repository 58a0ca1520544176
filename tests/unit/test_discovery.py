# SPDX-License-Identifier: GPL-2.0-or-later
"""Monitors found by looking."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmp_upm import discovery
from qmp_upm.discovery import Changes, Discovery


@contextlib.contextmanager
def listening(path: Path) -> Iterator[None]:
    """A socket, and at the end nothing."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        yield
    path.unlink()


def test_came_went_renewed(tmp_path: Path) -> None:
    """By path and inode; what is no socket is not there; single paths are only renewed."""
    found = Discovery()
    look = lambda: found.look([f"{tmp_path}/*.m"], [f"{tmp_path}/own"])  # noqa: E731
    a, own = f"{tmp_path}/a.m", f"{tmp_path}/own"
    (tmp_path / "file.m").write_text("")
    assert look() == Changes((), (), ())
    with listening(tmp_path / "a.m"), listening(tmp_path / "own"):
        assert look() == Changes((a,), (), (own,))
        assert look() == Changes((), (), ())
    with listening(tmp_path / "a.m"):
        assert look() == Changes((), (), (a,))
    assert look() == Changes((), (a,), ())


def test_no_more_than_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory in which somebody else makes sockets does not fill the daemon."""
    monkeypatch.setattr(discovery, "MONITORS_MOST", 3)
    with contextlib.ExitStack() as stack:
        for number in range(5):
            stack.enter_context(listening(tmp_path / f"{number}.m"))
        changes = Discovery().look([f"{tmp_path}/*.m"], [])
    assert (len(changes.came), changes.full) == (3, True)


def test_a_full_directory_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that are no sockets count, too, and none of them is looked at for itself."""
    monkeypatch.setattr(discovery, "ENTRIES_MOST", 50)
    asked: list[str] = []
    inode = discovery._inode
    monkeypatch.setattr(discovery, "_inode", lambda path: asked.append(path) or inode(path))
    for number in range(60):
        (tmp_path / f"{number}.m").write_text("")
    found = Discovery()
    assert found.look([f"{tmp_path}/*.m"], []).full
    assert not asked
    for number in range(20):
        (tmp_path / f"{number}.m").unlink()
    with listening(tmp_path / "a.m"):
        changes = found.look([f"{tmp_path}/*.m"], [])
    assert (changes.came, changes.full) == ((f"{tmp_path}/a.m",), False)


def test_globs_in_folders(tmp_path: Path) -> None:
    """As the shell has them: in any part of the path, hidden ones only if they are named."""
    for folder in ("one", "two", ".three"):
        (tmp_path / folder).mkdir()
    with contextlib.ExitStack() as stack:
        for path in ("one/a.m", "two/b.m", ".three/c.m", "one/.d.m"):
            stack.enter_context(listening(tmp_path / path))
        found = {
            glob: sorted(Discovery().look([f"{tmp_path}/{glob}"], []).came)
            for glob in ("*/*.m", "[ot]*/?.m", ".t*/c.m", "one/a.m", "no/*.m", "one/a.m/*")
        }
    expected = {
        "*/*.m": ["one/a.m", "two/b.m"],
        "[ot]*/?.m": ["one/a.m", "two/b.m"],
        ".t*/c.m": [".three/c.m"],
        "one/a.m": ["one/a.m"],
        "no/*.m": [],
        "one/a.m/*": [],
    }
    assert found == {g: [f"{tmp_path}/{p}" for p in paths] for g, paths in expected.items()}


def test_a_deserted_socket_is_no_vm_until_it_is_another(tmp_path: Path) -> None:
    """What a killed QEMU leaves is gone; a new one at the same path comes."""
    found, path = Discovery(), tmp_path / "a.m"
    globs = [f"{tmp_path}/*.m"]
    with listening(path):
        assert found.look(globs, []).came == (str(path),)
        found.desert(str(path))
        assert found.look(globs, []).went == (str(path),)
        assert found.look(globs, []) == Changes((), (), ())
    with listening(path):
        assert found.look(globs, []).came == (str(path),)
