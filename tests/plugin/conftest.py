# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds plugin/tests against the plugin's own sources, all but what finds QEMU's functions."""

import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.plugin.build import build, sources

NOT_THIS_HOST = 77
RUN_SECONDS = 300
# The plugin looks at every descriptor of QEMU's for the file of the RAM, also at those that another
# thread is just closing: a wrong one does not match.
SUPPRESSIONS = "race:same_file\n"

Harness = Callable[..., str]


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """``harness(program, sanitizers, *arguments)``: its output, if it held.

    Skips where the host lacks what the program needs (it exits with 77).
    """
    folder = tmp_path_factory.mktemp("harness")
    suppressions = folder / "suppressions"
    suppressions.write_text(SUPPRESSIONS, encoding="utf-8")
    env = os.environ | {"TSAN_OPTIONS": f"suppressions={suppressions}"}

    @cache
    def built(program: str, sanitizers: str) -> Path:
        target = folder / f"{program}-{sanitizers}"
        build(program, sources(program), target, ["-O1", f"-fsanitize={sanitizers}"])
        return target

    def run(program: str, sanitizers: str, *arguments: str) -> str:
        done = subprocess.run(
            [built(program, sanitizers), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_SECONDS,
            env=env,
        )
        if done.returncode == NOT_THIS_HOST:
            pytest.skip(done.stderr.strip() or "this host has not what the case needs")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(params=["address,undefined", "thread"])
def hold(request: pytest.FixtureRequest, harness: Harness) -> Callable[[str], None]:
    """``hold(case)``: the case of plugin/tests/hazards_*.c holds, under each pair of sanitizers."""

    def run(case: str) -> None:
        harness("hazards", request.param, case)

    return run
