# SPDX-License-Identifier: GPL-2.0-or-later
"""Discard policies for the private and shared memory of confidential VMs, over QMP."""

from importlib.metadata import version

__version__ = version("qmp-upm")
