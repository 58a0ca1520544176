# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of ``/metrics``, made in the event loop without holding it up.

Pictures of the VMs are taken, and metrics written, a few at a time; between them the loop serves
others. Each VM's figures are of one instant. However many ask, at once or one after the other, the
text is made once in a while, and shared.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus

from prometheus_client import ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from qmp_upm import logs
from qmp_upm.exporter import Page, Pages
from qmp_upm.host import Host
from qmp_upm.looplag import LoopLag
from qmp_upm.metrics import VM_FAMILIES, DaemonFigures, daemon_metrics
from qmp_upm.stats import VmView

VMS_AT_ONCE = 8
"""Of one metric, written before others are let run: a fraction of a millisecond."""
FRESH_SECONDS = 0.5
"""A text that is younger is given again; and up to FRESH_MOST if it took long to make."""
FRESH_MOST = 5.0
FRESH_TIMES = 10
"""Times what it took: so asking without end costs a tenth of a processor at most."""


class _One:
    """What the library takes to write a single metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


class Exposition:
    """``pictures`` takes one of each VM, lazily; ``others`` are the daemon's own metrics."""

    def __init__(
        self,
        pictures: Callable[[], Iterator[VmView]],
        others: Callable[[], Iterable[Metric]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pictures = pictures
        self._others = others
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self._text = b""
        self._fresh_until_s: float | None = None

    async def text(self) -> bytes:
        """In Prometheus' text format 0.0.4."""
        async with self._one_at_a_time:
            begun_s = self._clock()
            if self._fresh_until_s is None or begun_s >= self._fresh_until_s:
                self._text = await self._write()
                ended_s = self._clock()
                fresh_s = max(FRESH_SECONDS, FRESH_TIMES * (ended_s - begun_s))
                self._fresh_until_s = ended_s + min(fresh_s, FRESH_MOST)
            return self._text

    async def _write(self) -> bytes:
        vms: list[VmView] = []
        for vm in self._pictures():
            vms.append(vm)
            if len(vms) % VMS_AT_ONCE == 0:
                await asyncio.sleep(0)
        parts = [generate_latest(_One(metric)) for metric in self._others()]
        for family in VM_FAMILIES:
            for start in range(0, max(len(vms), 1), VMS_AT_ONCE):
                part = generate_latest(_One(family.metric(vms[start : start + VMS_AT_ONCE])))
                # HELP and TYPE stand before the first samples only.
                parts.append(part.split(b"\n", 2)[2] if start else part)
                await asyncio.sleep(0)
        return b"".join(parts)


def pages(host: Host, lag: LoopLag, ready: Callable[[], bool]) -> Pages:
    """What the daemon serves. ``ready``: whether it has looked for all its VMs once."""
    process = ProcessCollector(registry=None)

    def others() -> Iterator[Metric]:
        yield from daemon_metrics(
            DaemonFigures(
                host.reload_state,
                lag,
                host.telemetry.files.evicted_bytes,
                logs.writer.lost,
                host.supervisor.deaths,
            )
        )
        yield from process.collect()

    def pictures() -> Iterator[VmView]:
        return (session.view() for session in sorted(host.sessions, key=lambda s: s.name))

    exposition = Exposition(pictures, others)

    async def metrics() -> Page:
        return Page(await exposition.text(), kind=CONTENT_TYPE_PLAIN_0_0_4)

    async def healthz() -> Page:
        return Page(b"ok\n")  # from the loop itself: one that hangs does not answer

    async def readyz() -> Page:
        return Page(b"ok\n") if ready() else Page(b"not yet\n", HTTPStatus.SERVICE_UNAVAILABLE)

    return {"/metrics": metrics, "/healthz": healthz, "/readyz": readyz}
