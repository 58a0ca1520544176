# SPDX-License-Identifier: GPL-2.0-or-later
"""The newest QEMU: real, from Debian's mirror or from an earlier run's cache."""

import subprocess

from tests.lab import newest


def test_it_starts_here_and_launches_both_kinds() -> None:
    """It runs beside this system's libraries, is as new as promised, and knows SNP and TDX."""
    program = newest.program(newest.root())
    release = tuple(map(int, newest.version(program).split(".")[:2]))
    assert release >= (11, 1)
    told = subprocess.run([*program, "-object", "help"], check=True, capture_output=True, text=True)
    assert {"sev-snp-guest", "tdx-guest"} <= set(told.stdout.split())
