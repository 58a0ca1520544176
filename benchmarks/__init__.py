# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the README's figures come from. Not installed."""
