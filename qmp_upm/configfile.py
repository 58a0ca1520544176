# SPDX-License-Identifier: GPL-2.0-or-later
"""TOML files into a `Config`, and every error with its file, line, key and a hint.

The main file comes first, then the ``*.toml`` of the directory ``<main file>.d`` in the order of
their names. Tables of the same name are one table; of a key that several files have, the last one
counts. A policy is one value: it is replaced whole, with its parameters.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qmp_upm.config import (
    NAME,
    Config,
    ControlTable,
    HostTable,
    Key,
    MetricsTable,
    Origins,
    PolicyTable,
    TelemetryTable,
    VmSettings,
    VmTable,
)
from qmp_upm.errors import ConfigError

Tree = dict[str, Any]

# Strings and comments whole, so that no bracket or end of line is found in them.
_TOKENS = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|'
    r"'''.*?'{3,5}|"
    r'"(?:\\.|[^"\\\n])*"|'
    r"'[^'\n]*'|#[^\n]*|[\[\]{}\n]",
    re.DOTALL,
)

_TABLES: dict[str, type[BaseModel]] = {
    "telemetry": TelemetryTable,
    "metrics": MetricsTable,
    "control": ControlTable,
    "host": HostTable,
    "defaults": VmSettings,
    "vms": VmTable,
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: in which file and line, with which key, and what to do."""

    file: Path
    line: int | None
    key: str
    message: str
    hint: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else str(self.file)
        return f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"


def load_config(path: Path) -> Config:
    """The configuration in a file and its drop-ins. ConfigError says the first thing wrong."""
    config, problems = read_config(path)
    if config is None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]}{more}", hint=problems[0].hint)
    return config


def read_config(path: Path) -> tuple[Config | None, list[Problem]]:
    """The configuration, or all that is wrong with it."""
    tree: Tree = {}
    lines: dict[Key, tuple[Path, int]] = {}
    problems: list[Problem] = []
    for file in _files(path):
        try:
            text = file.read_text(encoding="utf-8")
            one = tomllib.loads(text)
        except OSError as error:
            problems.append(
                Problem(file, None, "", f"cannot read: {error.strerror}", "give it with --config")
            )
        except UnicodeDecodeError as error:
            problems.append(Problem(file, None, "", f"not TOML: {error}", "write it in UTF-8"))
        except tomllib.TOMLDecodeError as error:
            at = re.search(r"at line (\d+)", str(error))
            line = int(at[1]) if at else None
            problems.append(Problem(file, line, "", f"not TOML: {error}", "see configs/"))
        else:
            _merge(tree, one)
            _enter(lines, file, text)
    if problems:
        return None, problems
    return _validate(tree, Origins(path, lines))


def _files(path: Path) -> list[Path]:
    return [path, *sorted(path.with_name(path.name + ".d").glob("*.toml"))]


def _merge(tree: Tree, more: Tree) -> None:
    for key, value in more.items():
        known = tree.get(key)
        if isinstance(known, dict) and isinstance(value, dict) and key != "policy":
            _merge(known, value)
        else:
            tree[key] = value


def _enter(lines: dict[Key, tuple[Path, int]], file: Path, text: str) -> None:
    for key, line in key_lines(text):
        if key[-1] == "policy":
            for old in [old for old in lines if old[: len(key)] == key]:
                del lines[old]
        lines[key] = (file, line)


def key_lines(text: str) -> Iterator[tuple[Key, int]]:
    """The keys and tables of a valid TOML text, with their lines, from 1.

    A statement of TOML (a table's header, or a key and its value) is a text of TOML by itself.
    """
    table: Key = ()
    for statement, line in _statements(text):
        paths = list(_paths(tomllib.loads(statement)))
        if statement.lstrip().startswith("["):
            table = paths[-1]
            yield table, line
        else:
            for path in paths:
                yield (*table, *path), line


def _statements(text: str) -> Iterator[tuple[str, int]]:
    """Its statements with the lines that they begin in: they end where no bracket is open."""
    begin, line, next_line, depth = 0, 1, 1, 0
    for token in _TOKENS.finditer(text + "\n"):
        next_line += token[0].count("\n")
        depth += (token[0] in "[{") - (token[0] in "]}")
        if token[0] == "\n" and depth == 0:
            yield text[begin : token.end()], line
            begin, line = token.end(), next_line


def _paths(tree: Tree) -> Iterator[Key]:
    for key, value in tree.items():
        yield (key,)
        if isinstance(value, dict):
            for path in _paths(value):
                yield (key, *path)


def _validate(tree: Tree, origins: Origins) -> tuple[Config | None, list[Problem]]:
    main = origins.main or Path()

    def problem(key: Key, message: str, hint: str) -> Problem:
        file, line = origins.of(key) or (main, None)
        return Problem(file, line, ".".join(key), message, hint)

    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        return None, [
            problem(
                tuple(str(part) for part in one["loc"]),
                one["msg"].removeprefix("Value error, "),
                _hint(one["type"], tuple(str(part) for part in one["loc"])),
            )
            for one in error.errors(include_url=False)
        ]
    config._origins = origins  # noqa: SLF001 - its own loader
    problems = [problem(*wrong) for wrong in _contradictions(config)]
    return (None if problems else config), problems


def _contradictions(config: Config) -> Iterator[tuple[Key, str, str]]:
    """What each table alone can't know: key, message and hint."""
    tables: Mapping[Key, VmSettings] = {
        ("defaults",): config.defaults,
        **{("vms", name): vm for name, vm in config.vms.items()},
    }
    for key, table in tables.items():
        if "policy" in table.model_fields_set or key == ("defaults",):
            yield from _policy_problem((*key, "policy"), table.policy)
    sockets: dict[str, str] = {}
    for name, vm in config.vms.items():
        if not NAME.fullmatch(name):
            yield (
                ("vms", name),
                "not a usable name",
                "letters, digits, '.', '_' and '-', 64 at most: it names a file",
            )
        if vm.socket is not None and vm.socket in sockets:
            yield (
                ("vms", name, "socket"),
                f"{vm.socket} is the monitor of {sockets[vm.socket]!r} already",
                "give each VM a monitor of its own",
            )
        if vm.socket is not None:
            sockets[vm.socket] = name
    for pattern in config.discovery:
        if not pattern.startswith("/"):
            yield (("discovery",), f"{pattern!r} is not an absolute path", "begin it with '/'")
    if not sockets and not config.discovery:
        yield (("vms",), "no VM", "give a table in [vms] a 'socket', or 'discovery' a glob")


def _policy_problem(key: Key, policy: PolicyTable) -> Iterator[tuple[Key, str, str]]:
    try:
        policy.factory()
    except ConfigError as error:
        wrong = [name for name in policy.parameters if f": {name}: " in error.message]
        yield (*key, *wrong[:1]), error.message, error.hint


def _hint(kind: str, key: Key) -> str:
    if kind == "missing":
        return "add it; see configs/ for examples"
    if kind != "extra_forbidden":
        return "correct the value"
    model = _TABLES.get(key[0], Config) if len(key) > 1 else Config
    near = get_close_matches(key[-1], model.model_fields, 1)
    known = ", ".join(model.model_fields)
    return f"did you mean {near[0]!r}?" if near else f"there is no such key here; there are {known}"
