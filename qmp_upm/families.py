# SPDX-License-Identifier: GPL-2.0-or-later
"""Families of metrics in Prometheus' sense, declared once and filled from pictures of VMs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString

from qmp_upm.stats import VmView

PREFIX = "qmp_upm_"

Values = dict[tuple[str, ...], float]
"""Samples of one metric and VM, by the values of its labels."""


@dataclass(frozen=True)
class Histogram:
    """Cumulative: ``counts[i]`` are at most ``ends[i]`` seconds, the last one is of all.

    ``sum_seconds``: None where nobody has added them up.
    """

    ends: Sequence[float]
    counts: Sequence[int]
    sum_seconds: float | None


@dataclass(frozen=True)
class Family:
    """One metric: its kind, its labels beside ``domain``, and its samples of a VM."""

    kind: str
    name: str
    help: str
    read: Callable[[VmView], "float | Values | Histogram"]
    labels: tuple[str, ...] = field(default=())

    def metric(self, vms: Iterable[VmView]) -> Metric:
        """In the library's form, of these VMs."""
        made = Metric(PREFIX + self.name, self.help, self.kind)
        for vm in vms:
            domain = {"domain": vm.name}
            value = self.read(vm)
            if isinstance(value, Histogram):
                _add_histogram(made, domain, value)
            elif isinstance(value, dict):
                for key, part in value.items():
                    _add(made, domain | dict(zip(self.labels, key, strict=True)), part)
            else:
                _add(made, domain, value)
        return made


def _add(metric: Metric, labels: dict[str, str], value: float) -> None:
    suffix = "_total" if metric.type == "counter" else ""
    metric.add_sample(metric.name + suffix, labels, value)


def _add_histogram(metric: Metric, labels: dict[str, str], histogram: Histogram) -> None:
    ends = [str(floatToGoString(end)) for end in (*histogram.ends, math.inf)]  # type: ignore[no-untyped-call] # the library has no types there
    for end, count in zip(ends, histogram.counts, strict=True):
        metric.add_sample(f"{metric.name}_bucket", labels | {"le": end}, count)
    metric.add_sample(f"{metric.name}_count", labels, histogram.counts[-1])
    if histogram.sum_seconds is not None:
        metric.add_sample(f"{metric.name}_sum", labels, histogram.sum_seconds)


def single(kind: str, name: str, text: str, value: float | Histogram, **labels: str) -> Metric:
    """A metric without VMs, of one sample or histogram."""
    made = Metric(PREFIX + name, text, kind)
    if isinstance(value, Histogram):
        _add_histogram(made, labels, value)
    else:
        _add(made, labels, value)
    return made
