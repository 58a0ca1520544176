# SPDX-License-Identifier: GPL-2.0-or-later
"""The policies that come with qmp-upm, written against its public contract only."""
