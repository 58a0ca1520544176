# SPDX-License-Identifier: GPL-2.0-or-later
"""Mutants of C text: conditions negated, calls removed, breaks and returns dropped.

By tokens and not by a compiler: the plugin's sources have one style, functions begin and end in the
first column, and what doesn't compile is no mutant.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

# Calls whose absence must be seen: into the ledger, the operations, the lock and the C library.
CALLED = re.compile(
    r"\b(?:(?:ledger|op|ops|upm|bitmap|region|slot|slots|ring|convert|conversion|discard|launch|"
    r"request|lease|worker|drain|parts|pthread)_\w+|libc\.\w+|mmap|memmove|memset|free|realloc|"
    r"take_over|settle|settle_pages|take_range|lose_range|keep|leave|consume|no_longer_owed|"
    r"wake_waiters|set_private_fd|set_shared_fd|set_host|set_pages)\("
)
CONDITION = re.compile(r"\b(?:if|while) \(")
DROPPED = re.compile(r"\b(?:break|continue|return\b[^;]*);")
NOT_CODE = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'', re.DOTALL)
FUNCTION = re.compile(
    r"^(?=[a-z_])[^\n;={}]*?\b(\w+)\([^;{}]*?\)\n\{\n(.*?)^\}", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of a file: ``text[start:end]`` becomes ``new``.

    ``text`` is what stands there, with its spaces squeezed; with ``number``, which counts equal
    ones in a function, it names the mutant wherever the line has moved to.
    """

    file: str
    function: str
    kind: str
    text: str
    start: int
    end: int
    new: str
    number: int = 0

    def __str__(self) -> str:
        which = f" #{self.number}" if self.number else ""
        return f"{self.file} {self.function}(): {self.kind}: {self.text}{which}"

    def applied_to(self, source: str) -> str:
        """The file's mutated text."""
        return source[: self.start] + self.new + source[self.end :]


def squeezed(text: str) -> str:
    """With one space for each run of them."""
    return " ".join(text.split())


def closing(text: str, opening: int) -> int:
    """The index behind the parenthesis that closes the one at ``opening``."""
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at + 1
    raise ValueError(f"no end: {text[opening : opening + 40]!r}")


def _blanked(source: str) -> str:
    return NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)


def _call_start(code: str, at: int) -> bool:
    """Whether a statement begins at this place."""
    before = code[:at].rstrip(" ")
    return before.endswith("\n") and code[: len(before)].rstrip()[-1] in ";{})"


def _mutants_of(code: str, begin: int, end: int) -> Iterator[tuple[str, int, int, str]]:
    """Kind, start, end and the new text."""
    for found in CONDITION.finditer(code, begin, end):
        stop = closing(code, found.end() - 1)
        yield "negated", found.end(), stop - 1, f"!({code[found.end() : stop - 1]})"
    for found in CALLED.finditer(code, begin, end):
        stop = closing(code, found.end() - 1)
        statement = code[stop : stop + 1] == ";" and _call_start(code, found.start())
        yield "call removed", found.start(), stop, "(void)0" if statement else "0"
    for found in DROPPED.finditer(code, begin, end):
        yield "dropped", found.start(), found.end(), ";"


def mutants(file: str, source: str) -> list[Mutant]:
    """All mutants of a file's text, in the order of their places."""
    code = _blanked(source)
    found = []
    for function in FUNCTION.finditer(code):
        for kind, start, end, new in _mutants_of(code, function.start(2), function.end(2)):
            original = source[start:end]
            new_text = f"!({original})" if kind == "negated" else new
            found.append(Mutant(file, function[1], kind, squeezed(original), start, end, new_text))
    found.sort(key=lambda m: (m.start, m.end))
    seen: Counter[tuple[str, str, str]] = Counter()
    numbered = []
    for mutant in found:
        key = (mutant.function, mutant.kind, mutant.text)
        numbered.append(replace(mutant, number=seen[key]))
        seen[key] += 1
    return numbered


def by_hand(name: str, file: str, source: str, find: str, new: str) -> Mutant:
    """A mutant written out; raises ValueError unless its text is there once, spaces aside."""
    pattern = r"\s+".join(re.escape(word) for word in find.split())
    places = list(re.finditer(pattern, source))
    if len(places) != 1:
        raise ValueError(f"{name}: {file} has its text {len(places)} times")
    place = places[0]
    return Mutant(file, name, "by hand", squeezed(find), place.start(), place.end(), new)
