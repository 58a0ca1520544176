# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a server listens, as people write it: ``"127.0.0.1:9469"``, ``"[::1]:9469"``, or ``""``."""

import ipaddress
from typing import Annotated

from pydantic import AfterValidator

PORT_MOST = 65535


def split_listen(text: str) -> tuple[str, int] | None:
    """Address and port; None if the text is empty. Raises ValueError on anything else.

    An address is written out, ``0.0.0.0`` too: nothing listens to a network by omission. Names are
    not looked up.
    """
    if not text:
        return None
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = None
    if address is None or not port.isdecimal() or int(port) > PORT_MOST:
        raise ValueError(
            f"{text!r} is not an address and a port; write, for example, '127.0.0.1:9469', or '' "
            "for none"
        )
    return str(address), int(port)


def _checked(text: str) -> str:
    split_listen(text)
    return text


Listen = Annotated[str, AfterValidator(_checked)]
"""An address and a port, or nothing."""
