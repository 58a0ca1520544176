# SPDX-License-Identifier: GPL-2.0-or-later
"""Policies in virtual time: workloads, prices, the clairvoyant optimum, and the engine.

The policies, the ledger and the rules by which a session reads and decides are those of the daemon;
only the VM is simulated. Nothing here knows the daemon.
"""
