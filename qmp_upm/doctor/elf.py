# SPDX-License-Identifier: GPL-2.0-or-later
"""The names that a program exports to what is loaded into it: an ELF file's dynamic symbols."""

import struct
from dataclasses import dataclass
from pathlib import Path

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")
MAGIC = b"\x7fELF\x02\x01"
"""64 bits, little endian: all that runs QEMU with KVM on x86."""

SHT_DYNSYM = 11
SHN_UNDEF = 0


class ElfError(Exception):
    """The file is no ELF program of this kind, or damaged. Contained: becomes a check's finding."""


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int


def exported_names(path: Path) -> frozenset[str]:
    """The symbols defined in the file's dynamic symbol table. Raises ElfError or OSError."""
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        raise ElfError(f"{path} is no 64-bit ELF program")
    try:
        sections = _sections(data)
        table = next((one for one in sections if one.kind == SHT_DYNSYM), None)
        if table is None:
            raise ElfError(f"{path} has no dynamic symbols")
        strings = _content(data, sections[table.link])
        return frozenset(
            strings[name : strings.index(b"\0", name)].decode("ascii", "replace")
            for name, _info, _other, where, _value, _size in SYMBOL.iter_unpack(
                _content(data, table)
            )
            if where != SHN_UNDEF and name
        )
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise ElfError(f"{path} is damaged: {error}") from error


def _sections(data: bytes) -> list[_Section]:
    header = HEADER.unpack_from(data)
    start, entry, count = header[6], header[11], header[12]
    found = []
    for number in range(count):
        section = SECTION.unpack_from(data, start + number * entry)
        found.append(_Section(section[1], section[4], section[5], section[6]))
    return found


def _content(data: bytes, section: _Section) -> bytes:
    return data[section.offset : section.offset + section.size]
