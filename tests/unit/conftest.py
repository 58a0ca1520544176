# SPDX-License-Identifier: GPL-2.0-or-later
"""A control socket with a host behind it that only takes notes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from qmp_upm.connection import Limits
from qmp_upm.control import ControlServer
from qmp_upm.errors import ConfigError, UnavailableError, UnknownVmError
from qmp_upm.events import HostEvent, Publisher, Subscription
from qmp_upm.protocol import Copy
from qmp_upm.settings import Setting
from qmp_upm.stats import State, VmStats, VmView
from qmp_upm.trace import Block


def _view(name: str) -> VmView:
    stats = VmStats(flips=7, peak_stale_bytes=1 << 20)
    stats.conversions = {Copy.PRIVATE: 1500, Copy.SHARED: 500}
    stats.count_discard(Copy.SHARED, "age", 8192, 0)
    stats.plugin_counters = {"deferred-bytes-private": 4096, "deferred-bytes-shared": 12288}
    stats.reused_bytes = {Copy.PRIVATE: 4096, Copy.SHARED: 0}
    stats.convert_ns[9] = 100
    return VmView(
        name=name,
        uuid=None,
        socket=f"/run/{name}.monitor",
        state=State.ATTACHED,
        since=1.5,
        trouble=None,
        qemu_version="10.0.2",
        plugin_version="0.1.0",
        vm_kind="SEV-SNP",
        policy="lazy",
        parameters={"max_age": 10.0},
        fallen_back=None,
        budget_bytes=1 << 28,
        stale_bytes={Copy.PRIVATE: 4096, Copy.SHARED: 8192},
        stats=stats,
    )


class _FakeHost:
    """Two VMs, and a note of what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.events: Publisher[HostEvent] = Publisher()
        self.batches: Publisher[Block] = Publisher()
        self.gate = asyncio.Event()
        self.gate.set()
        self.views = {name: _view(name) for name in ("db", "web")}

    def vms(self) -> list[VmView]:
        return list(self.views.values())

    def vm(self, name: str) -> VmView:
        if name not in self.views:
            raise UnknownVmError(f"there is no VM {name!r}", hint="known: db, web")
        return self.views[name]

    def config_of(self, name: str) -> list[Setting]:
        self.vm(name)
        return [Setting("budget", 1 << 28, "config.toml [defaults]")]

    async def set_policy(self, name: str, policy: str, parameters: Mapping[str, object]) -> None:
        self.vm(name)
        if policy == "greedy":
            raise ConfigError("there is no policy 'greedy'", hint="installed: lazy")
        self.asked.append(("set_policy", name, policy, parameters))

    async def set_budget(self, name: str, budget_bytes: int | None) -> dict[str, int]:
        self.vm(name)
        self.asked.append(("set_budget", name, budget_bytes))
        own = 1 << 28 if budget_bytes is None else budget_bytes
        return {"budget": min(own, 1 << 29), "own": own}

    async def flush(self, name: str, copy: Copy | None = None) -> int:
        self.vm(name)
        if name == "web":
            raise UnavailableError("web is not attached", hint="wait")
        self.asked.append(("flush", name, copy))
        await self.gate.wait()
        return 12288

    async def reload(self) -> None:
        raise RuntimeError("a defect")

    def subscribe(self) -> Subscription[HostEvent]:
        return self.events.subscribe()

    def record(self, name: str) -> Subscription[Block]:
        self.vm(name)
        return self.batches.subscribe()


@pytest.fixture
async def host() -> _FakeHost:
    """The host behind the socket."""
    return _FakeHost()


@pytest.fixture
async def server(host: _FakeHost, tmp_path: Path) -> AsyncIterator[ControlServer]:
    """A server that has started; small limits, so that they are met."""
    limits = Limits(clients=4, message_bytes=4096, patience_s=5.0)
    server = ControlServer(tmp_path / "run" / "control.sock", host, limits)
    with capture_logs():
        await server.start()
        yield server
        await server.stop()
    assert not server.path.exists()
