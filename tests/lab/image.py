# SPDX-License-Identifier: GPL-2.0-or-later
"""Firmware that QEMU can launch, and a kernel that it can hash: metadata and patterns, no code.

At the end of a firmware is a table of entries, each ending in its length and its GUID, with a
footer 48 bytes before the end of the file. QEMU (pc_sysfw_ovmf.c, sev.c, tdvf.c) reads there where
SNP's and TDX's metadata are, counted from the end of the file, SEV-ES's reset vector, and the area
for the kernel's hashes.
"""

import struct
import uuid
from collections.abc import Sequence
from pathlib import Path

PAGE = 4096
FIRMWARE_BYTES = 1 << 20
FIRMWARE = (1 << 32) - FIRMWARE_BYTES
"""Address of the firmware."""
VARIABLES_BYTES = 128 << 10
"""The first part of the firmware, which TDX does not measure."""

FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
RESET_VECTOR = uuid.UUID("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
HASHES = uuid.UUID("7255371f-3a3b-4b04-927b-1da6efa8d454")
SNP_METADATA = uuid.UUID("dc886566-984a-4798-a75e-5585a7bf67cc")
TDX_METADATA = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2")

SNP_MEMORY, SNP_SECRETS, SNP_CPUID, SNP_HASHES = 1, 2, 3, 0x10
SECRETS_PAGE, CPUID_PAGE, HASHES_PAGE = 0x80D000, 0x80E000, 0x80F000
SNP_PAGES = (
    (0x800000, 0x9000, SNP_MEMORY),
    (0x80A000, 0x3000, SNP_MEMORY),
    (SECRETS_PAGE, PAGE, SNP_SECRETS),
    (CPUID_PAGE, PAGE, SNP_CPUID),
    (HASHES_PAGE, PAGE, SNP_HASHES),
    (0x810000, 0x10000, SNP_MEMORY),
)
"""Address, bytes and kind, about where OVMF has them."""

TDX_CODE, TDX_VARIABLES, TDX_HOB, TDX_SCRATCH = range(4)
TDX_MEASURED = 1
TDX_SECTIONS = (
    (VARIABLES_BYTES, FIRMWARE_BYTES - VARIABLES_BYTES, FIRMWARE + VARIABLES_BYTES, TDX_CODE),
    (0, VARIABLES_BYTES, FIRMWARE, TDX_VARIABLES),
    (0, 0x10000, 0x810000, TDX_SCRATCH),
    (0, 0x2000, 0x809000, TDX_HOB),
)
"""Offset in the file, bytes, address and kind."""


def write_firmware(path: Path) -> None:
    """1 MiB whose every page differs from every other, and is nowhere zero."""
    image = bytearray()
    for page in range(FIRMWARE_BYTES // PAGE):
        image += struct.pack("<HH", 0x9090, page + 1) * (PAGE // 4)
    snp, tdx = _snp_metadata(), _tdx_metadata()
    at = FIRMWARE_BYTES - PAGE
    image[at : at + len(snp)] = snp
    image[at + len(snp) : at + len(snp) + len(tdx)] = tdx
    table = _table(
        [
            (TDX_METADATA, struct.pack("<I", PAGE - len(snp))),
            (SNP_METADATA, struct.pack("<I", PAGE)),
            (HASHES, struct.pack("<II", HASHES_PAGE, 0x400)),
            (RESET_VECTOR, struct.pack("<I", 0x80B004)),
        ]
    )
    end = FIRMWARE_BYTES - 32
    image[end - len(table) : end] = table
    path.write_bytes(image)


def write_kernel(path: Path) -> None:
    """What QEMU takes for a Linux kernel: a header of the boot protocol, 4 + 1 sectors, a body."""
    image = bytearray(b"\x90" * (16 << 10))
    image[0x1F1] = 4
    image[0x202:0x208] = b"HdrS\x0c\x02"
    image[0x211] = 1
    path.write_bytes(image)


def _table(entries: Sequence[tuple[uuid.UUID, bytes]]) -> bytes:
    parts = [data + struct.pack("<H", len(data) + 18) + guid.bytes_le for guid, data in entries]
    body = b"".join(parts)
    return body + struct.pack("<H", len(body) + 18) + FOOTER.bytes_le


def _snp_metadata() -> bytes:
    entries = b"".join(struct.pack("<III", *page) for page in SNP_PAGES)
    return b"ASEV" + struct.pack("<III", 16 + len(entries), 1, len(SNP_PAGES)) + entries


def _tdx_metadata() -> bytes:
    entries = b""
    for offset, size, address, kind in TDX_SECTIONS:
        in_file = size if kind in (TDX_CODE, TDX_VARIABLES) else 0
        measured = TDX_MEASURED if kind == TDX_CODE else 0
        entries += struct.pack("<IIQQII", offset, in_file, address, size, kind, measured)
    return b"TDVF" + struct.pack("<III", 16 + len(entries), 1, len(TDX_SECTIONS)) + entries
