# SPDX-License-Identifier: GPL-2.0-or-later
"""The telemetry file of a VM."""

import asyncio
from pathlib import Path

from qmp_upm.telemetry import FLUSH_SECONDS, Telemetry, read_totals


async def test_stopping_loses_no_line(tmp_path: Path) -> None:
    """Lines that are being written, and lines that wait, are in the file when run() has ended."""
    telemetry = Telemetry(tmp_path, "vm")
    telemetry.line("first")
    writing = asyncio.create_task(telemetry.run())
    async with asyncio.timeout(20 + FLUSH_SECONDS):
        while telemetry.waiting:  # noqa: ASYNC110 - the very moment in which a write has begun
            await asyncio.sleep(0)
        telemetry.line("second")
        telemetry.stop()
        await writing
    text = telemetry.path.read_text(encoding="utf-8")
    assert ['"first"' in text, '"second"' in text] == [True, True]


async def test_torn_line_spoils_no_other(tmp_path: Path) -> None:
    """A daemon that was killed left half a line: the next one's first line is whole."""
    (tmp_path / "vm.jsonl").write_text('{"event": "ba', encoding="utf-8")
    telemetry = Telemetry(tmp_path, "vm")
    telemetry.line("discard", discarded_bytes=4096, skipped_bytes=0)
    await telemetry.flush()
    telemetry.line("discard", discarded_bytes=4096, skipped_bytes=0)
    await telemetry.flush()
    assert read_totals(telemetry.path)["discarded_bytes"] == 8192
