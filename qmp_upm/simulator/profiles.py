# SPDX-License-Identifier: GPL-2.0-or-later
"""Named prices, and where each comes from."""

from importlib.resources import files
from pathlib import Path

from qmp_upm.errors import ConfigError
from qmp_upm.prices import Prices, load_prices

_DMA_TRANSACTIONS = 5_100
_BOOT_S, _BOOT_BOTH_S, _BOOT_PRIVATE_ONLY_S = 32.0, 103.0, 68.0
_PAGE_S, _REFAULT_S = 0.25e-6, 2e-6


def mail_2022() -> Prices:
    """Prices behind the three boot times in the mail of June 2022 that this project starts from.

    A guest of 1 GB booted in 32 s without two backings, in 103 s with both discards, and in 68 s
    with that of the shared copy switched off. Its firmware made about 5,100 DMA transactions (the
    count was published for the same firmware later), so about 10,200 conversions: half of them
    discard the shared copy, half the private one. Then

    - discards of the shared copy cost 103 - 68 = 35 s, 6.86 ms each with the fault that follows;
    - those of the private copy are assumed to cost the same, another 35 s;
    - what is left of 71 s, 1 s, is the conversions, 98 µs each.

    How the 6.86 ms divide was not published. A zap then flushed the caches of all processors, once
    a call; so nearly all is given to the call, and to a page what it costs on a machine of that
    time: 0.25 µs to discard, 2 µs to fault in and zero (assumptions). Transfers are taken to be of
    one page.
    """
    conversions = 2 * _DMA_TRANSACTIONS
    discard_s = (_BOOT_BOTH_S - _BOOT_PRIVATE_ONLY_S) / _DMA_TRANSACTIONS
    others_s = _BOOT_BOTH_S - _BOOT_S - conversions * discard_s
    return Prices(
        conversion=others_s / conversions,
        discard_call=discard_s - _PAGE_S - _REFAULT_S,
        discard_page=_PAGE_S,
        refault_page=_REFAULT_S,
    )


def free() -> Prices:
    """Discards and faults cost nothing: the case for ``eager``. A limit, not a measurement."""
    return Prices(conversion=2e-6, discard_call=0, discard_page=0, refault_page=0)


def measured() -> Prices:
    """What ``calibrate`` measured on the machine of our own benchmarks; its file says how."""
    return load_prices(Path(str(files("qmp_upm.simulator") / "measured.toml")))


PROFILES = {"measured": measured, "mail-2022": mail_2022, "free": free}


def find_profile(name: str) -> Prices:
    """The profile of this name, or the prices in this file, which ``calibrate`` has written."""
    if name in PROFILES:
        return PROFILES[name]()
    if name.endswith(".toml"):
        return load_prices(Path(name))
    raise ConfigError(
        f"there is no profile {name!r}",
        hint=f"profiles: {', '.join(PROFILES)}, or a .toml file of 'qmp-upm calibrate'",
    )
