# SPDX-License-Identifier: GPL-2.0-or-later
"""What is not as it should be with a VM's memory, in words for its operator."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from qmp_upm.protocol import Region


class Remark(BaseModel):
    """What the plugin says of a VM's memory, and what to do about it."""

    model_config = ConfigDict(frozen=True)

    seen: str
    hint: str


_KNOWN = {
    "unknown": Remark(
        seen="the plugin does not know how to discard its shared copies: QEMU discards these by "
        "itself, and only private copies are deferred",
        hint="give the VM its memory from memory-backend-memfd, or from memory-backend-file with "
        "share=on",
    ),
    "failing": Remark(
        seen="the host refuses to discard there: QEMU's own discards and their errors go through "
        "until one succeeds",
        hint="see QEMU's standard error, and whether the file system of the VM's memory can punch "
        "holes",
    ),
    "lost": Remark(
        seen="the plugin can't follow it any more: all discards there are QEMU's own",
        hint="restart the VM; the host was short of memory",
    ),
}


def _kind(region: Region) -> str:
    """Of the remark on it; a region that is all right has none."""
    return region.state if region.state in _KNOWN else region.backing


def remarks(regions: Sequence[Region]) -> tuple[Remark, ...]:
    """At most one of each kind, however many regions a VM says it has."""
    found = []
    for kind, remark in _KNOWN.items():
        names = [region.name for region in regions if _kind(region) == kind]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(remark.model_copy(update={"seen": f"{names[0]}{more}: {remark.seen}"}))
    return tuple(found)
