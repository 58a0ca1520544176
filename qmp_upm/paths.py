# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things are on a host, for all who have to agree on it."""

from pathlib import Path

CONTROL_SOCKET = Path("/run/qmp-upm/control.sock")
"""The daemon's control socket, unless the configuration says otherwise."""
