# SPDX-License-Identifier: GPL-2.0-or-later
"""What conversions, discards and held memory cost on a host.

``adaptive`` weighs these prices, and the simulator adds them up.

All are in seconds of processor time, so that time and memory can be added. They differ between
hosts by orders of magnitude; ``qmp-upm calibrate`` measures a host's own and writes them to a file
of this form (TOML)::

    [prices]
    discard_call = 3.1e-6
    ...

    [measured]      # by whom and how, with spreads; for people, not read back
"""

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmp_upm.errors import ConfigError

GIB = 1 << 30

HELD_GIB_SECOND = 0.125
"""What a GiB held for a second is worth, in seconds of one processor, unless somebody says better.

An assumption: eight GiB are worth a processor, about what clouds charge that sell the two apart.
"""

Price = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]


class Prices(BaseModel):
    """Seconds of processor time for each thing that happens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    conversion: Price
    """A conversion without any discard: the exit and the ioctl. Nobody can spare it."""
    discard_call: Price
    """One hole punch, whatever its length."""
    discard_page: Price
    """Each page of 4 KiB in it."""
    refault_page: Price
    """A page that returns and finds its copy gone: the fault, the allocation, the zeroing."""
    held_gib_second: Price = HELD_GIB_SECOND
    """Rent: a GiB of stale copies held for a second."""

    @property
    def held_byte_second(self) -> float:
        """Rent of one byte for a second."""
        return self.held_gib_second / GIB


def load_prices(path: Path) -> Prices:
    """The prices in a file of ``calibrate``. ConfigError says what is wrong with it."""
    hint = "write one with 'qmp-upm calibrate -o FILE'"
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}", hint=hint) from error
    try:
        return Prices.model_validate(tree.get("prices"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(("prices", *(str(part) for part in first["loc"])))
        raise ConfigError(f"{path}: {key}: {first['msg']}", hint=hint) from error
