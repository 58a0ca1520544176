# SPDX-License-Identifier: GPL-2.0-or-later
"""A plugin built from this source tree with some of its text exchanged: a test must notice."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.build import LabError, cached, run

SOURCE = Path(__file__).parents[2] / "plugin"
FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-D_GNU_SOURCE", '-DUPM_VERSION="0"', "-pthread")
FLAGS += ("-fvisibility=hidden", "-ftls-model=initial-exec")


@dataclass(frozen=True)
class Edit:
    """In one file of the plugin's, ``old`` becomes ``new``; it must be there just once."""

    file: str
    old: str
    new: str


def build_plugin(edits: Sequence[Edit]) -> Path:
    """The plugin so changed, from the cache if it was built before.

    Raises LabError if the text to be changed is not there, or the result does not build.
    """
    texts = {file.name: file.read_text("utf-8") for file in sorted(SOURCE.glob("*.[ch]"))}
    for edit in edits:
        found = texts[edit.file].count(edit.old)
        if found != 1:
            raise LabError(
                f"plugin/{edit.file} has this {found} times, not once:\n{edit.old}\n"
                "hint: the plugin has changed; adapt the mutant"
            )
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)

    def make(target: Path) -> None:
        folder = target.parent / "source"
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        sources = [str(folder / name) for name in texts if name.endswith(".c")]
        run(["gcc", *FLAGS, "-o", str(target), *sources, "-ldl"], "gcc of a mutant")
        shutil.rmtree(folder)

    return cached("mutant.so", [text.encode() for text in texts.values()], make)
