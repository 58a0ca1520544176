# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's configuration: models that are its only description.

`qmp_upm.configfile` fills them from TOML files, `qmp-upm config schema` prints them as JSON Schema.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from qmp_upm.listen import Listen
from qmp_upm.paths import CONTROL_SOCKET
from qmp_upm.policy import Policy, PolicyFactory, find_policy
from qmp_upm.units import Bytes, Seconds

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A VM's name: it also names a file."""

Key = tuple[str, ...]
"""Where a setting stands: ``("vms", "web", "budget")``."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PolicyTable(BaseModel):
    """A policy's name, and beside it the policy's own parameters."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str = "lazy"
    """One of the installed policies."""
    _factory: PolicyFactory | None = PrivateAttr(None)

    @property
    def parameters(self) -> dict[str, object]:
        """What is given beside the name."""
        return dict(self.__pydantic_extra__ or {})

    def factory(self) -> PolicyFactory:
        """The policy with these parameters, as it was when first asked for.

        A configuration asks when it is loaded. ConfigError if there is no such policy.
        """
        if self._factory is None:
            self._factory = find_policy(self.name, self.parameters)
        return self._factory

    def make(self) -> Policy:
        """One for another VM. Raises what the policy's own code raises, and ConfigError."""
        return self.factory()()


class TelemetryTable(_Table):
    """Where JSON lines go."""

    directory: Path
    """One file for each VM."""
    file_size: Annotated[Bytes, Field(ge=1 << 20)] = 16 << 20
    """A VM's file is begun anew at this size, and the old one kept beside it."""
    total_size: Annotated[Bytes, Field(ge=4 << 20)] = 1 << 30
    """All telemetry files together never take more; the oldest of the VM with most go first."""


class MetricsTable(_Table):
    """Where Prometheus finds ``/metrics``."""

    listen: Listen = "127.0.0.1:9469"
    """Address and port; empty: nowhere."""


class ControlTable(_Table):
    """The daemon's own QMP socket."""

    socket: Path = CONTROL_SOCKET
    """Its path; only the daemon's user may open it."""
    group: Annotated[str, Field(min_length=1)] | None = None
    """A group whose members may open it, too. They can do all that the daemon can."""


class HostTable(_Table):
    """What concerns all VMs together."""

    budget: Bytes | None = None
    """The most stale bytes of all VMs together, divided over them; without it no such limit."""
    discovery_interval: Annotated[Seconds, Field(ge=0.01)] = 1.0
    """How often the globs of ``discovery`` are looked at."""
    pressure_interval: Annotated[Seconds, Field(ge=0.01)] = 2.0
    """How often memory pressure is read; the kernel's averages change every two seconds."""


class VmSettings(_Table):
    """What applies to a VM."""

    budget: Bytes = 256 << 20
    """The most stale bytes that the VM may hold."""
    weight: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Its part of the host's budget, beside the weights of the others."""
    lease: Annotated[Seconds, Field(ge=0.1)] = 20.0
    """How long the plugin keeps copies without hearing from the daemon, which speaks up two to five
    times as often: a short lease costs an idle VM processor time, a long one holds memory after a
    crash, within the budget."""
    notify: Seconds = 0.02
    """The least time between two doorbells of the plugin."""
    policy: PolicyTable = PolicyTable()
    """Which stale copies go, and when."""


SETTINGS = tuple(VmSettings.model_fields)


class VmTable(VmSettings):
    """One VM, or several: the keys that it has come before those of ``[defaults]``.

    It is about the VM of its own name; with ``match``, about those whose names match; with
    ``socket``, it is a VM that is looked for there, and is called by the table's name.
    """

    socket: Annotated[str, Field(min_length=1, max_length=107)] | None = None
    """Path of a QMP monitor that nobody else uses."""
    match: Annotated[list[str], Field(min_length=1)] | None = None
    """Globs for names of VMs, ``web-*``."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.socket is not None and self.match is not None:
            raise ValueError("'socket' and 'match' in one table: it is about one VM, or about many")
        return self

    def applies_to(self, own_name: str, vm: str) -> bool:
        """Whether the VM is one of those that the table, called ``own_name``, is about."""
        if self.match is not None:
            return any(fnmatchcase(vm, pattern) for pattern in self.match)
        return own_name == vm


@dataclass(frozen=True)
class Origins:
    """Which file and line each key of a configuration is from."""

    main: Path | None = None
    lines: dict[Key, tuple[Path, int]] = field(default_factory=dict)

    def of(self, key: Key) -> tuple[Path, int] | None:
        """Of a key, or of the nearest table around it; None if no file says anything of it."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key)


class Config(_Table):
    """The configuration of ``qmp-upm run``: TOML, and ``*.toml`` in ``<file>.d`` in name order."""

    telemetry: TelemetryTable
    metrics: MetricsTable = MetricsTable()
    control: ControlTable = ControlTable()
    host: HostTable = HostTable()
    discovery: list[str] = []
    """Globs for monitors of VMs that may come and go: ``/run/libvirt/qemu/upm/*.monitor``."""
    defaults: VmSettings = VmSettings()
    vms: dict[str, VmTable] = {}
    """Tables for single VMs and for groups of them. Later ones come before earlier ones, and the
    VM's own before all."""
    _origins: Origins = PrivateAttr(default_factory=Origins)

    @property
    def origins(self) -> Origins:
        """Where each key stands."""
        return self._origins

    @property
    def static(self) -> dict[str, str]:
        """Sockets of VMs that the configuration names, by name."""
        return {name: vm.socket for name, vm in self.vms.items() if vm.socket is not None}

    def sources_of(self, vm: str) -> dict[str, Key]:
        """For each setting of a VM, the key that gives it, in a VM's table or in ``[defaults]``."""
        sources: dict[str, Key] = {key: ("defaults", key) for key in SETTINGS}
        for name in self._tables_for(vm):
            for key in self.vms[name].model_fields_set & set(SETTINGS):
                sources[key] = ("vms", name, key)
        return sources

    def settings_of(self, vm: str) -> VmSettings:
        """What applies to the VM of this name."""
        values = {}
        for key, (_, *table, _) in self.sources_of(vm).items():
            values[key] = getattr(self.vms[table[0]] if table else self.defaults, key)
        return VmSettings.model_construct(**values)

    def _tables_for(self, vm: str) -> Iterator[str]:
        groups = [name for name, table in self.vms.items() if table.match is not None]
        singles = [name for name, table in self.vms.items() if table.match is None]
        return (name for name in groups + singles if self.vms[name].applies_to(name, vm))
