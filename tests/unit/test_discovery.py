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
