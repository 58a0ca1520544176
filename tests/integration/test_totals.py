# SPDX-License-Identifier: GPL-2.0-or-later
"""One guest, one daemon, and four who tell of it: what they say is the same, to the byte."""

import asyncio
import json
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qmp_upm.client import ControlClient, connect
from qmp_upm.pages import PAGE_BYTES
from qmp_upm.protocol import Copy
from qmp_upm.telemetry import read_totals
from qmp_upm.testing import FakePlugin, FakeVm
from qmp_upm.trace import read_trace

PROGRAM = Path(sys.executable).with_name("qmp-upm")
RAM = 64 << 20
Samples = dict[tuple[str, str], float]


async def until(done: Callable[[], Any]) -> None:
    """Waits for it, thirty seconds at most."""
    async with asyncio.timeout(30):
        while not done():  # noqa: ASYNC110 - processes and files tell nobody
            await asyncio.sleep(0.02)


@pytest.fixture
async def vm(tmp_path: Path) -> AsyncIterator[FakeVm]:
    """A QEMU with the plugin, at tmp_path/guest.monitor."""
    made = FakeVm(FakePlugin({"ram": RAM}))
    async with made.listening(tmp_path / "guest.monitor"):
        yield made


@pytest.fixture
async def daemon(tmp_path: Path, vm: FakeVm) -> AsyncIterator[dict[str, Any]]:
    """The installed daemon, once it serves the VM: what its log says of its start."""
    config = tmp_path / "config.toml"
    config.write_text(
        f'[telemetry]\ndirectory = "{tmp_path}"\nfile_size = "1 MiB"\n'
        f'[control]\nsocket = "{tmp_path}/control.sock"\n[metrics]\nlisten = "127.0.0.1:0"\n'
        f'[vms.guest]\nsocket = "{tmp_path}/guest.monitor"\nbudget = "1 MiB"\nnotify = "1 ms"\n'
        'policy = { name = "lazy", max_age = "100 ms" }\n',
        encoding="utf-8",
    )
    process = await asyncio.create_subprocess_exec(
        PROGRAM, "run", "--config", config, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    started: dict[str, Any] = {}
    async for line in process.stderr:
        started = json.loads(line) if b'"started"' in line else started
        if b'"attached"' in line:
            break
    assert vm.plugin.ledger.budget == 1 << 20
    yield started
    process.send_signal(signal.SIGTERM)
    await process.communicate()
    assert process.returncode == 0


class Guest:
    """Converts at random, and keeps its own books."""

    def __init__(self, plugin: FakePlugin) -> None:
        self.conversions = dict.fromkeys(Copy, 0)
        self.bytes = dict.fromkeys(Copy, 0)
        self._plugin = plugin
        self._chance = random.Random(7)  # noqa: S311 - a test's chance is known

    def convert(self) -> None:
        """A range of some pages, to either side."""
        pages = self._chance.randint(1, 32)
        first = self._chance.randrange(RAM // PAGE_BYTES - pages)
        live = self._chance.choice(list(Copy))
        self._plugin.convert(
            1, first * PAGE_BYTES, pages * PAGE_BYTES, to_private=live is Copy.PRIVATE
        )
        self.conversions[live] += 1
        self.bytes[live] += pages * PAGE_BYTES


async def start_recorder(socket: Path, trace: Path) -> asyncio.subprocess.Process:
    """``qmp-upm record``, once it records."""
    recorder = await asyncio.create_subprocess_exec(
        *(PROGRAM, "record", "guest", "-o", trace, "--socket", socket),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert recorder.stderr is not None
    assert (
        await recorder.stderr.readline() == b"recording guest, which is attached; Ctrl-C ends it\n"
    )
    return recorder


def scrape(port: int) -> Samples:
    """Samples of /metrics, by their name and their labels but for the domain."""
    client = HTTPConnection("127.0.0.1", port, timeout=20)
    client.request("GET", "/metrics")
    text = client.getresponse().read().decode()
    client.close()
    return {
        (sample.name, ",".join(v for k, v in sorted(sample.labels.items()) if k != "domain")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def settled(control: ControlClient, counters: Mapping[str, int]) -> dict[str, Any]:
    """The VM's counters as the control socket has them, once the daemon has read the plugin's."""
    async with asyncio.timeout(30):
        while True:
            stats: dict[str, Any] = (await control.execute("query-vm", {"name": "guest"}))["stats"]
            seen = stats["plugin_counters"]
            if all(seen[name] == counters[name] for name in counters if "bytes" in name):
                return stats
            await asyncio.sleep(0.05)


async def test_all_tell_the_same(tmp_path: Path, vm: FakeVm, daemon: dict[str, Any]) -> None:
    """Guest, plugin, telemetry, metrics, control socket and trace add up to one another."""
    guest, trace, counters = Guest(vm.plugin), tmp_path / "t.upm", vm.plugin.ledger.counters
    recorder = await start_recorder(tmp_path / "control.sock", trace)
    for _ in range(40):
        for _ in range(50):
            guest.convert()
        await asyncio.sleep(0.01)
    made = sum(guest.conversions.values())
    await until(lambda: vm.plugin.ledger.stale_pages == 0)
    await until(lambda: read_totals(tmp_path / "guest.jsonl")["conversions"] == made)
    async with connect(tmp_path / "control.sock") as control:
        stats = await settled(control, counters)
    samples = await asyncio.to_thread(scrape, daemon["metrics_port"])
    lines = read_totals(tmp_path / "guest.jsonl")
    recorder.send_signal(signal.SIGINT)
    await recorder.communicate()
    records = read_trace(trace).records

    assert counters["over-budget-bytes"] > 0
    for copy in Copy:
        assert counters[f"conversions-to-{copy}"] == guest.conversions[copy]
        assert stats["conversions"][copy] == guest.conversions[copy]
        assert samples["qmp_upm_conversions_total", copy] == guest.conversions[copy]
        assert (
            records["count"][records["private"] == (copy is Copy.PRIVATE)].sum()
            == (guest.conversions[copy])
        )
        assert stats["converted_bytes"][copy] == guest.bytes[copy]
        assert samples["qmp_upm_converted_bytes_total", copy] == guest.bytes[copy]
        assert lines[f"to_{copy}_bytes"] == guest.bytes[copy]
        reused = counters[f"reused-bytes-{copy}"]
        assert reused > 0
        assert stats["reused_bytes"][copy] == reused
        assert samples["qmp_upm_reused_bytes_total", copy] == reused
        requested = counters[f"requested-bytes-{copy}"]
        assert requested > 0
        assert sum(stats["discarded_bytes"][copy].values()) == requested
        assert requested == sum(
            value
            for (name, labels), value in samples.items()
            if name == "qmp_upm_discarded_bytes_total" and labels.startswith(f"{copy},")
        )
        assert samples["qmp_upm_stale_bytes", copy] == stats["stale_bytes"][copy] == 0
        assert samples["qmp_upm_plugin_bytes_total", f"{copy},requested"] == requested
    assert lines["conversions"] == made
    assert lines["dropped"] == stats["dropped_records"] == 0
    assert lines["lost_lines"] == samples["qmp_upm_telemetry_lost_lines_total", ""] == 0
    assert lines["discarded_bytes"] == sum(counters[f"requested-bytes-{copy}"] for copy in Copy)
    assert samples["qmp_upm_convert_duration_seconds_count", ""] == made
    assert samples["qmp_upm_peak_stale_bytes", ""] == vm.plugin.ledger.peak_pages * PAGE_BYTES
    assert samples["qmp_upm_vm_up", ""] == 1
