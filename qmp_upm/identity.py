# SPDX-License-Identifier: GPL-2.0-or-later
"""Who a QEMU says it is, and what the daemon makes of it: names are not trusted.

A VM is called by the name that QEMU was given (``query-name``), else by its UUID (``query-uuid``),
else after its socket. The name is a metric's label, the same as in libvirt's exporters: only its
length has an end, and what can't be printed is replaced. The file of a VM is called `file_stem` of
its name: letters, digits, ``.``, ``_`` and ``-``.
"""

import contextlib
import re
from collections.abc import Container
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, count
from pathlib import PurePath
from typing import Annotated

from pydantic import ConfigDict, Field

from qmp_upm.errors import CommandError
from qmp_upm.protocol import Message, read_message
from qmp_upm.qmp import Monitor

NAME_MOST = 128
"""Characters: a namespace and a name of KubeVirt's have 127."""
FILE_MOST = 64
DIGEST_DIGITS = 10
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_UNUSABLE = re.compile(r"[^A-Za-z0-9._-]+")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class _Name(Message):
    """Answer to query-name."""

    name: Annotated[str, Field(max_length=4096)] | None = None


class _Uuid(Message):
    """Answer to query-uuid."""

    model_config = ConfigDict(alias_generator=None)

    UUID: Annotated[str, Field(max_length=64)] = ""


@dataclass(frozen=True)
class Identity:
    """What a QEMU says of itself; None where it says nothing."""

    name: str | None = None
    uuid: str | None = None

    def wanted_name(self, socket: str) -> str:
        """The name that this VM should have, if nobody else has it."""
        stem = PurePath(socket).name.removesuffix(".monitor").removesuffix(".sock")
        for text in (self.name, self.uuid, stem):
            if text and (name := usable(text)):
                return name
        return "vm"


async def identify(monitor: Monitor) -> Identity:
    """Ask QEMU. MessageError if it answers what is no name."""
    name: str | None = None
    uuid = ""
    # A QEMU may be built without either, and be called after its socket.
    with contextlib.suppress(CommandError):
        name = read_message(_Name, await monitor.execute("query-name", oob=False)).name
    with contextlib.suppress(CommandError):
        uuid = read_message(_Uuid, await monitor.execute("query-uuid", oob=False)).UUID.lower()
    known = _UUID.fullmatch(uuid) is not None and uuid != _NO_UUID
    return Identity(name, uuid if known else None)


def usable(text: str) -> str:
    """The text as a name; empty if nothing of it can be read."""
    shown = "".join(c if c.isprintable() else "_" for c in text[: 4 * NAME_MOST])
    return shown.strip()[:NAME_MOST].strip() if shown.strip("_ ") else ""


def file_stem(name: str) -> str:
    """What the file of a VM of this name is called; another name has another one.

    A name that can't be a file's is told apart by a digest.
    """
    stem = _UNUSABLE.sub("_", name).strip("._-")
    if stem == name and len(name) <= FILE_MOST:
        return name
    digest = sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:DIGEST_DIGITS]
    return f"{stem[: FILE_MOST - DIGEST_DIGITS - 1]}-{digest}".lstrip("-")


def unique(wanted: str, socket: str, taken: Container[str]) -> str:
    """``wanted``, or if another VM is called so, the same with the socket's own part behind it."""
    if wanted not in taken:
        return wanted
    first = f"{wanted[:64]}-{Identity().wanted_name(socket)[:48]}"
    others = (f"{first}-{number}" for number in count(2))
    return next(name for name in chain([first], others) if name not in taken)
