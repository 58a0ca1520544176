# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds plugin/tests against the plugin's own sources, all but what finds QEMU's functions."""

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "plugin"
NOT_THIS_HOST = 77
RUN_SECONDS = 300
WRAPPED = ("malloc", "calloc", "realloc", "mmap", "fopen", "opendir", "pthread_create")

Harness = Callable[..., str]


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """``harness(program, sanitizers, *arguments)``: its output, if it held.

    Skips where the host lacks what the program needs (it exits with 77).
    """
    folder = tmp_path_factory.mktemp("harness")

    @cache
    def built(program: str, sanitizers: str) -> Path:
        target = folder / f"{program}-{sanitizers}"
        sources = [p for p in sorted(PLUGIN.glob("*.c")) if p.name != "qemu.c"]
        sources += [PLUGIN / "tests" / f"{name}.c" for name in ("fake", program)]
        command = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", '-DUPM_VERSION="test"', "-g", "-O1"]
        command += ["-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizers}"]
        if program == "faults":
            command += [f"-Wl,--wrap={name}" for name in WRAPPED]
        if "undefined" in sanitizers:
            command += ["-fno-sanitize-recover=all"]
        subprocess.run([*command, *sources, "-o", target, "-lpthread", "-ldl"], check=True)
        return target

    def run(program: str, sanitizers: str, *arguments: str) -> str:
        done = subprocess.run(
            [built(program, sanitizers), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_SECONDS,
        )
        if done.returncode == NOT_THIS_HOST:
            pytest.skip(done.stderr.strip() or "this host has not what the case needs")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
