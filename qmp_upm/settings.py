# SPDX-License-Identifier: GPL-2.0-or-later
"""What applies to a VM, and from where."""

from dataclasses import dataclass

from qmp_upm.config import Config


@dataclass(frozen=True)
class Setting:
    """A setting of a VM, its value as in JSON, and the file and line or the command it is from."""

    key: str
    value: object
    source: str


def configured(config: Config, vm: str) -> list[Setting]:
    """What the configuration says of the VM of this name."""
    values = config.settings_of(vm).model_dump(mode="json")
    settings = []
    for key, path in config.sources_of(vm).items():
        origin = config.origins.lines.get(path)
        table = ".".join(path[:-1])
        source = f"{origin[0]}:{origin[1]} [{table}]" if origin else "built in"
        settings.append(Setting(key, values[key], source))
    return settings
