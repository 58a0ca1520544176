# SPDX-License-Identifier: GPL-2.0-or-later
"""`make mutants`: some test of the plugin's must fail for every change of its code.

Each mutant is run against the harness without sanitizers, then under LeakSanitizer and
ThreadSanitizer, then against the torture, until something fails; three times. A run that hangs has
failed. mutants.toml has the mutants written by hand and those that change nothing, each with its
reason. Exit code 0: none survives; 1: those that are printed do.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.plugin.build import BASE, LIBRARIES, PLUGIN, sources, wraps
from tests.plugin.mutate import Mutant, by_hand, mutants

MUTATED = (
    *("convert.c", "discard.c", "ops.c", "regions.c", "slots.c", "bitmap.c", "ledger.c"),
    *("parts.c", "worker.c", "requests.c"),
)
LIST = Path(__file__).with_name("mutants.toml")
RUNS = 3
NOT_THIS_HOST = 77
LEAST_SECONDS, SLOWER = 4.0, 10
TORTURE = ("memfd", "3", "150", "1")
FAULTS = (
    *("regions", "conversions", "lost-slot", "reset", "no-descriptors", "no-key", "commands"),
    "worker",
)
# A return that a function needs, and a variable that nothing sets, make no program to be judged.
FLAGS = ("-Wall", "-Wno-error", "-Werror=return-type", "-O1")
ALL_FLAGS = {
    "plain": FLAGS,
    "leak": (*FLAGS, "-fsanitize=leak"),
    "thread": (*FLAGS, "-fsanitize=thread"),
}
LOCKS = re.compile(r"upm_(?:un)?lock|pthread_")
# What takes memory and gives it back, seen by LeakSanitizer.
LEAKS = ("requests",)
# What several threads do at once, seen by ThreadSanitizer.
RACES = (
    *("many-vcpus", "during-the-discard", "flipped-back", "vcpus-do-not-wait", "closed-region"),
    *("served-meanwhile", "commands-do-not-wait", "ended-threads", "other-madvise"),
    *("drain-retries", "requests", "lease-runs-out", "resets", "in-place-later"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a program: its arguments, and the flavour that it is built in."""

    program: str
    flavour: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.program, self.flavour, *self.arguments))


@dataclass(slots=True)
class Harness:
    """The objects that do not change, and how long each case takes when all is well."""

    folder: Path
    objects: dict[tuple[str, str], Path] = field(default_factory=dict)
    seconds: dict[Case, float] = field(default_factory=dict)
    kills: Counter[Case] = field(default_factory=Counter)

    def compile(self, source: Path, target: Path, flavour: str) -> bool:
        """One object; False if it doesn't compile."""
        command = [*BASE, *ALL_FLAGS[flavour], f"-I{PLUGIN}", "-c", source, "-o", target]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def prepare(self, programs: Sequence[str]) -> None:
        """Compiles all that is never mutated, and the rest as it is."""
        for program in programs:
            for source in sources(program):
                for flavour in ALL_FLAGS:
                    key = (source.name, flavour)
                    target = self.folder / f"{source.stem}-{flavour}.o"
                    if key not in self.objects:
                        if not self.compile(source, target, flavour):
                            raise SystemExit(f"mutants: {source} doesn't compile")
                        self.objects[key] = target

    def link(self, program: str, flavour: str, target: Path, instead: dict[str, Path]) -> None:
        """The program, with some of its objects replaced."""
        files = [
            instead.get(source.name, self.objects[source.name, flavour])
            for source in sources(program)
        ]
        command = [*BASE, *ALL_FLAGS[flavour], *wraps(program), *files, "-o", target, *LIBRARIES]
        subprocess.run(command, check=True, capture_output=True)

    def limit(self, case: Case) -> float:
        """Seconds after which a run has failed."""
        return max(LEAST_SECONDS, SLOWER * self.seconds[case])


def fails(program: Path, case: Case, limit: float) -> bool:
    """Whether the run ends badly, or not in time."""
    try:
        done = subprocess.run(
            [program, *case.arguments], capture_output=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode not in {0, NOT_THIS_HOST}


@dataclass(slots=True)
class Trial:
    """One mutant, its programs built when they are needed."""

    harness: Harness
    mutant: Mutant
    folder: Path
    built: dict[tuple[str, str], Path] = field(default_factory=dict)
    mutated: dict[str, Path] = field(default_factory=dict)

    def compiles(self) -> bool:
        """Writes the mutated file and compiles it."""
        source = self.folder / self.mutant.file
        original = (PLUGIN / self.mutant.file).read_text(encoding="utf-8")
        source.write_text(self.mutant.applied_to(original), encoding="utf-8")
        return self.object("plain") is not None

    def object(self, flavour: str) -> Path | None:
        """The mutated file's object; None if it doesn't compile."""
        if flavour not in self.mutated:
            source = self.folder / self.mutant.file
            target = self.folder / f"{source.stem}-{flavour}.o"
            if not self.harness.compile(source, target, flavour):
                return None
            self.mutated[flavour] = target
        return self.mutated[flavour]

    def program(self, case: Case) -> Path:
        """The mutated program of a case."""
        key = (case.program, case.flavour)
        if key not in self.built:
            target = self.folder / f"{case.program}-{case.flavour}"
            compiled = self.object(case.flavour)
            instead = {self.mutant.file: compiled} if compiled else {}
            self.harness.link(case.program, case.flavour, target, instead)
            self.built[key] = target
        return self.built[key]

    def killer(self, cases: Sequence[Case]) -> Case | None:
        """The first case that fails."""
        for case in cases:
            if fails(self.program(case), case, self.harness.limit(case)):
                return case
        return None


def judge(harness: Harness, mutant: Mutant, cases: Sequence[Case]) -> str | None:
    """None if it doesn't compile, "" if it survives, else what kills it."""
    with tempfile.TemporaryDirectory(dir=harness.folder) as folder:
        trial = Trial(harness, mutant, Path(folder))
        if not trial.compiles():
            return None
        order = sorted(cases, key=lambda case: (-harness.kills[case], cases.index(case)))
        if LOCKS.match(mutant.text):
            order.sort(key=lambda case: case.flavour != "thread")
        first = None
        for _ in range(RUNS):
            killer = trial.killer(order)
            if killer is None:
                return ""
            first = first or killer
            order.remove(killer)
            order.insert(0, killer)
        if first is None:
            return ""
        harness.kills[first] += 1
        return str(first)


def listed() -> tuple[list[Mutant], dict[tuple[str, str, str, str, int], str]]:
    """The mutants written by hand, and the reasons of those that change nothing."""
    table: dict[str, Any] = tomllib.loads(LIST.read_text(encoding="utf-8"))
    hand = [
        by_hand(
            one["name"],
            one["file"],
            (PLUGIN / one["file"]).read_text(encoding="utf-8"),
            one["find"],
            one["replace"],
        )
        for one in table.get("hand", [])
    ]
    equal = {
        (one["file"], one["function"], one["kind"], one["text"], one.get("number", 0)): one[
            "reason"
        ]
        for one in table.get("equivalent", [])
    }
    return hand, equal


def all_cases(folder: Path, harness: Harness) -> list[Case]:
    """Every case that holds on the code as it is, with its seconds."""
    programs = {}
    for program in ("hazards", "faults", "torture"):
        for flavour in ALL_FLAGS:
            programs[program, flavour] = folder / f"{program}-{flavour}"
            harness.link(program, flavour, programs[program, flavour], {})
    names = subprocess.run(
        [programs["hazards", "plain"]], capture_output=True, text=True, check=True
    ).stdout.split()
    cases = [Case("hazards", "plain", (name,)) for name in names]
    cases += [Case("faults", "plain", (name,)) for name in FAULTS]
    cases += [Case("torture", "plain", TORTURE)]
    cases += [Case("hazards", "leak", (name,)) for name in LEAKS]
    cases += [Case("hazards", "thread", (name,)) for name in names if name in RACES]
    cases += [Case("torture", "thread", TORTURE)]
    for case in cases:
        start = time.monotonic()
        if fails(programs[case.program, case.flavour], case, 120):
            raise SystemExit(f"mutants: {case} fails on the code as it is")
        harness.seconds[case] = time.monotonic() - start
    # A flavour after the other, quick ones first.
    return sorted(
        cases,
        key=lambda case: (
            list(ALL_FLAGS).index(case.flavour),
            case.program == "torture",
            harness.seconds[case],
        ),
    )


def run(wanted: Callable[[Mutant], bool], jobs: int, *, verbose: bool) -> int:
    """Judges all; the number of survivors."""
    hand, equal = listed()
    chosen = list(hand)
    for file in MUTATED:
        chosen += mutants(file, (PLUGIN / file).read_text(encoding="utf-8"))
    known = {(m.file, m.function, m.kind, m.text, m.number) for m in chosen}
    stale = [key for key in equal if key not in known]
    chosen = [m for m in chosen if wanted(m)]
    judged = [m for m in chosen if (m.file, m.function, m.kind, m.text, m.number) not in equal]
    counts: Counter[str] = Counter(equivalent=len(chosen) - len(judged))
    survivors = []
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        harness.prepare(("hazards", "faults", "torture"))
        cases = all_cases(Path(folder), harness)

        def one(mutant: Mutant) -> None:
            verdict = judge(harness, mutant, cases)
            with lock:
                if verbose:
                    print(f"{verdict!r}: {mutant}", flush=True)
                if verdict is None:
                    counts["not compiled"] += 1
                elif verdict:
                    counts["killed"] += 1
                else:
                    survivors.append(mutant)
                    print(f"survives: {mutant}", flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, judged))
    for key in stale:
        print(f"mutants.toml: no such mutant any more: {key}")
    print(
        f"killed {counts['killed']}, equivalent {counts['equivalent']}, "
        f"not compiled {counts['not compiled']}, survivors {len(survivors)}"
    )
    return len(survivors) + len(stale)


def main() -> int:
    """Exit code 0, or 1 if a mutant survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.plugin.mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--only", default="", help="regular expression that a mutant's line has")
    parser.add_argument("--verbose", action="store_true", help="say what kills each")
    parser.add_argument("--list", action="store_true", help="say which there are, and end")
    args = parser.parse_args()
    pattern = re.compile(args.only)
    if args.list:
        hand, _ = listed()
        for file in MUTATED:
            hand += mutants(file, (PLUGIN / file).read_text(encoding="utf-8"))
        print(*(str(m) for m in hand if pattern.search(str(m))), sep="\n")
        return 0
    return int(
        bool(run(lambda mutant: bool(pattern.search(str(mutant))), args.jobs, verbose=args.verbose))
    )


if __name__ == "__main__":
    sys.exit(main())
