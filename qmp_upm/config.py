# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's configuration: a TOML file, read into models that are its only description."""

import re
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmp_upm.errors import ConfigError
from qmp_upm.policy import Policy, make_policy
from qmp_upm.units import Bytes, Seconds


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PolicyTable(BaseModel):
    """``[….policy]``: the policy's name, and beside it the policy's own parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "lazy"

    def make(self) -> Policy:
        """The policy with these parameters; ConfigError if it can't be made."""
        return make_policy(self.name, dict(self.__pydantic_extra__ or {}))


class TelemetryTable(_Table):
    """``[telemetry]``: where JSON lines go."""

    directory: Path
    file_size: Annotated[Bytes, Field(ge=1 << 20)] = 16 << 20
    """A VM's file is begun anew at this size, and the old one kept beside it."""
    total_size: Annotated[Bytes, Field(ge=4 << 20)] = 1 << 30
    """All telemetry files together never take more; the oldest of the VM with most go first."""


class MetricsTable(_Table):
    """``[metrics]``: where Prometheus finds ``/metrics``."""

    listen: str = "127.0.0.1:9469"
    """Address and port; empty: nowhere."""


class ControlTable(_Table):
    """``[control]``: the daemon's own QMP socket."""

    socket: Path = Path("/run/qmp-upm/control.sock")


class HostTable(_Table):
    """``[host]``: what concerns all VMs together."""

    budget: Bytes | None = None
    """The most stale bytes of all VMs together, divided over them; without it no such limit."""


class VmDefaults(_Table):
    """``[defaults]``: what holds for every VM that doesn't say otherwise."""

    budget: Bytes = 256 << 20
    """The most stale bytes that the VM may hold."""
    lease: Seconds = 5.0
    """How long the plugin keeps copies without hearing from the daemon."""
    notify: Seconds = 0.02
    """The least time between two doorbells of the plugin."""
    policy: PolicyTable = PolicyTable()


class VmTable(VmDefaults):
    """``[vms.NAME]``: one VM."""

    socket: Annotated[str, Field(min_length=1, max_length=107)]
    """Path of a QMP monitor that nobody else uses."""


class Config(_Table):
    """The whole file."""

    telemetry: TelemetryTable
    metrics: MetricsTable = MetricsTable()
    control: ControlTable = ControlTable()
    host: HostTable = HostTable()
    defaults: VmDefaults = VmDefaults()
    vms: Annotated[dict[str, VmTable], Field(min_length=1)]


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def load_config(path: Path) -> Config:
    """The configuration in a file. ConfigError names the file, the key and what to do."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint="give a file with --config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}", hint="see configs/ for examples") from error
    defaults, vms = tree.get("defaults", {}), tree.get("vms", {})
    if isinstance(defaults, dict) and isinstance(vms, dict):
        tree["vms"] = {
            name: defaults | vm if isinstance(vm, dict) else vm for name, vm in vms.items()
        }
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {key}: {first['msg']}", hint=_hint(first["type"])) from error
    for name, vm in config.vms.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: vms.{name}: not a usable name",
                hint="letters, digits, '.', '_' and '-', 64 at most: it names a file",
            )
        try:
            vm.policy.make()
        except ConfigError as error:
            raise ConfigError(
                f"{path}: vms.{name}.policy: {error.message}", hint=error.hint
            ) from error
    return config


def _hint(kind: str) -> str:
    if kind == "extra_forbidden":
        return "there is no such key; check its spelling and its table"
    if kind == "missing":
        return "add it; see configs/ for examples"
    return "correct the value"
