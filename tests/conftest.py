# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the lab importable; last, so that the installed packages are the ones under test.

No test may depend on how fast the machine is at the moment: Hypothesis' deadline is off for all.
"""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.append(str(Path(__file__).parents[1]))
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
