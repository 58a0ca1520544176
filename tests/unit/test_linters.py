# SPDX-License-Identifier: GPL-2.0-or-later
"""Style and types are tests like any other."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "qmp_upm", "policies", "tests", "benchmarks", "examples"],
        ["ruff", "format", "--check", "qmp_upm", "policies", "tests", "benchmarks", "examples"],
        ["mypy", "qmp_upm", "policies"],
    ],
    ids=" ".join,
)
def test_linter_is_content(command: list[str]) -> None:
    """Ruff and mypy find nothing."""
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
