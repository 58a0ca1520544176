# SPDX-License-Identifier: GPL-2.0-or-later
"""What stands in examples/ works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "policy"
PROGRAM = """
from qmp_upm.ledger import Ledger
from qmp_upm.pages import PageSet, Range
from qmp_upm.policy import Batch, Pressure, make_policy
from qmp_upm.protocol import Copy
from qmp_upm.records import make_records

policy = make_policy("patient", {"patience": "3 s"})
ledger = Ledger(1 << 30)
ledger.apply(make_records([(1, 0, 8192, 1, 1, 0, 1)]), 0)
early = policy.decide(Batch(), ledger, 2_000_000_000, Pressure())
assert (early.discards, early.wake_at_ns) == ((), 3_000_000_000)
late = policy.decide(Batch(), ledger, 3_000_000_000, Pressure())
assert [(d.copy, d.pages) for d in late.discards] == [(Copy.SHARED, PageSet.of(Range(1, 0, 8192)))]
"""


def test_smallest_policy_installs_and_decides(tmp_path: Path) -> None:
    """It is found by its entry point and does what it says."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(EXAMPLE, source)  # setuptools builds in place
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, source],
        check=True,
        capture_output=True,
    )
    subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, env=dict(os.environ, PYTHONPATH=str(target))
    )
