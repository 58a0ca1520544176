# SPDX-License-Identifier: GPL-2.0-or-later
"""Real conversions on any machine: stock QEMU, real KVM, nested under emulation where need be."""
