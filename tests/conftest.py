# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the lab importable; last, so that the installed packages are the ones under test."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
