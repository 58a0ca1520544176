# SPDX-License-Identifier: GPL-2.0-or-later
"""The plugin's C, without QEMU: plugin/tests run under the compiler's sanitizers."""
