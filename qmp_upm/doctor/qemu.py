# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU program: what it exports, and whether the plugin answers in it.

The plugin is tried as it will be used: QEMU is started with it on KVM, without a machine or guest,
under the seccomp filter that libvirt asks for, and is asked for the plugin's state.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qmp_upm.doctor.check import Check, Places, Status
from qmp_upm.doctor.elf import ElfError, exported_names
from qmp_upm.errors import InstallError, MessageError
from qmp_upm.plugin import plugin_path
from qmp_upm.protocol import PROTOCOL, Query, read_message

NEEDED = (
    "kvm_convert_memory",
    "qmp_register_command",
    "qmp_commands",
    "qobject_from_json",
    "qobject_to_json",
    "qdict_put_obj",
    "qapi_event_emit",
    "error_setg_internal",
    "g_string_free",
)
"""What the plugin takes from QEMU; a test compares it with plugin/qemu.c."""

FROM_LIBRARIES = frozenset({"g_string_free"})
"""Those that QEMU itself need not define: GLib does."""

PROGRAMS = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm")
ARGUMENTS = (
    *("-machine", "none", "-accel", "kvm", "-nodefaults", "-display", "none", "-S"),
    *("-qmp", "stdio"),
)
SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
SECONDS = 20.0
QUESTION = (
    '{"execute": "qmp_capabilities"}\n{"execute": "x-upm-query", "id": "plugin"}\n'
    '{"execute": "quit"}\n'
)


def find_qemu() -> Path | None:
    """The QEMU that this distribution would start."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    return Path(found) if found else None


def check_qemu(program: Path | None, places: Places) -> Iterator[Check]:
    """Version, symbols, the plugin's file, and the two together."""
    if program is None:
        yield Check(
            "qemu", Status.FAIL, "no QEMU for x86-64 found", "install it, or name it: --qemu PATH"
        )
        return
    version = _version(program)
    yield version
    if version.status is Status.FAIL:
        return
    yield _symbols(program)
    try:
        plugin = plugin_path()
    except InstallError as error:
        yield Check("plugin", Status.FAIL, error.message, error.hint)
        return
    if not os.access(places.kvm, os.R_OK | os.W_OK):
        yield Check(
            "plugin", Status.UNKNOWN, "not tried: it wakes up when QEMU opens KVM", "see kvm above"
        )
        return
    yield from _together(program, plugin)


def _version(program: Path) -> Check:
    try:
        result = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("qemu", Status.FAIL, f"{program}: {error}", "name another one: --qemu PATH")
    line = result.stdout.partition("\n")[0]
    if result.returncode or "QEMU" not in line:
        return Check(
            "qemu", Status.FAIL, f"{program} --version says no version of QEMU", "--qemu PATH"
        )
    return Check("qemu", Status.OK, f"{program}: {line}")


def _symbols(program: Path) -> Check:
    try:
        names = exported_names(program)
    except (ElfError, OSError) as error:
        return Check(
            "symbols", Status.UNKNOWN, str(error), "give the program itself, not what starts it"
        )
    missing = [name for name in NEEDED if name not in names and name not in FROM_LIBRARIES]
    if missing:
        return Check(
            "symbols",
            Status.FAIL,
            f"QEMU does not export {', '.join(missing)}",
            "QEMU 9.1 or newer, built with --enable-modules as distributions do",
        )
    return Check("symbols", Status.OK, f"QEMU exports the {len(NEEDED)} names the plugin needs")


@dataclass(frozen=True)
class _Trial:
    """A QEMU that was started with the plugin: its state, or why there is none."""

    query: Query | None
    said: str


def _together(program: Path, plugin: Path) -> Iterator[Check]:
    confined = _try(program, plugin, SANDBOX)
    free = confined if confined.query else _try(program, plugin, ())
    if free.query is None:
        yield Check(
            "plugin",
            Status.FAIL,
            f"does not answer in this QEMU: {free.said or 'no word from it'}",
            f"try it by hand: LD_PRELOAD={plugin} {program} -machine none -accel kvm",
        )
        return
    if free.query.protocol != PROTOCOL:
        yield Check(
            "plugin",
            Status.FAIL,
            f"it speaks protocol {free.query.protocol}, this release {PROTOCOL}",
            "install both from one release",
        )
        return
    yield Check("plugin", Status.OK, f"answers in this QEMU: {plugin}")
    if confined.query:
        yield Check("seccomp", Status.OK, "answers under libvirt's seccomp filter too")
    else:
        yield Check(
            "seccomp",
            Status.WARN,
            f"does not answer under libvirt's seccomp filter: {confined.said or 'no word'}",
            "with libvirt: seccomp_sandbox = 0 in /etc/libvirt/qemu.conf; report what QEMU said",
        )


def _try(program: Path, plugin: Path, sandbox: tuple[str, ...]) -> _Trial:
    """Start QEMU with the plugin and ask; it ends by itself."""
    try:
        result = subprocess.run(
            [str(program), *ARGUMENTS, *sandbox],
            input=QUESTION,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env=dict(os.environ, LD_PRELOAD=str(plugin)),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Trial(None, f"QEMU neither answered nor ended within {SECONDS:.0f} s")
    said = result.stderr.strip().replace("\n", "; ")[:400]
    for line in result.stdout.splitlines():
        try:
            answer = json.loads(line)
            if isinstance(answer, dict) and answer.get("id") == "plugin":
                if "return" in answer:
                    return _Trial(read_message(Query, answer["return"]), said)
                said = said or str(answer.get("error"))[:400]
        except (ValueError, RecursionError, MessageError) as error:
            said = said or str(error)[:400]
    return _Trial(None, said)
