# SPDX-License-Identifier: GPL-2.0-or-later
"""How a program of plugin/tests is compiled: with the plugin's objects that ship, but qemu.c."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

PLUGIN = Path(__file__).parents[2] / "plugin"
TESTS = PLUGIN / "tests"
BASE = ("gcc", "-std=gnu11", "-D_GNU_SOURCE", '-DUPM_VERSION="test"', "-g")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
LIBRARIES = ("-lpthread", "-ldl")
# The functions that a program stands in front of, in its own link.
WRAPPED = {
    "faults": (
        *("malloc", "calloc", "realloc", "mmap", "fopen", "opendir", "pthread_create", "dlsym"),
        "pthread_key_create",
    ),
    "holds": (
        *("pthread_mutex_lock", "pthread_mutex_trylock", "pthread_mutex_unlock"),
        *("pthread_cond_wait", "pthread_cond_timedwait"),
    ),
}


def plugin_sources() -> list[Path]:
    """The plugin's own, but what finds QEMU's functions: the fake stands in for that."""
    return [path for path in sorted(PLUGIN.glob("*.c")) if path.name != "qemu.c"]


def sources(program: str) -> list[Path]:
    """All that ``program`` is made of."""
    parts = [*sorted(TESTS.glob("fake*.c")), *sorted(TESTS.glob(f"{program}_*.c"))]
    return [*plugin_sources(), *parts, TESTS / f"{program}.c"]


def wraps(program: str) -> list[str]:
    """The linker's options for what the program stands in front of."""
    return [f"-Wl,--wrap={name}" for name in WRAPPED.get(program, ())]


def build(program: str, files: Sequence[Path], target: Path, options: Sequence[str]) -> None:
    """Compiles and links; raises CalledProcessError."""
    flags = list(options)
    if any("undefined" in option for option in options):
        flags.append("-fno-sanitize-recover=all")
    command = [*BASE, *WARNINGS, *flags, *wraps(program), *files, "-o", target, *LIBRARIES]
    subprocess.run(command, check=True)
