# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host may ask of a VM's session, which does it in its own task and in order."""

from dataclasses import dataclass

from qmp_upm.config import PolicyTable, VmSettings
from qmp_upm.protocol import Copy


@dataclass(frozen=True)
class SetPolicy:
    """Another policy, until the configuration of the policy changes."""

    table: PolicyTable


@dataclass(frozen=True)
class SetBudget:
    """Another budget, until the configuration of the budget changes; None: the configuration's."""

    budget_bytes: int | None


@dataclass(frozen=True)
class SetShare:
    """The VM's part of the host's budget; None: the host has none. Answered with the bytes held."""

    share_bytes: int | None


@dataclass(frozen=True)
class Apply:
    """What the configuration says now."""

    settings: VmSettings


@dataclass(frozen=True)
class Flush:
    """Discard what is stale, of one copy or both. Answered with the bytes given back."""

    copy: Copy | None


Ask = SetPolicy | SetBudget | SetShare | Apply | Flush
