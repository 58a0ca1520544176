# SPDX-License-Identifier: GPL-2.0-or-later
"""A small HTTP server for whoever watches the daemon: a few pages, read-only.

Clients are not trusted. Each connection is one request, within a time and a size. There are only so
many at once; for one more, the one is closed that has waited longest without asking. A browser that
was led to a listener of loopback by a name of somebody else's is told nothing.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import h11
import structlog

from qmp_upm.errors import ConfigError
from qmp_upm.listen import split_listen

CONNECTIONS_MOST = 16
ASK_SECONDS = 1.0
"""How long a client may take to ask: they are on this host, or near."""
CONNECTION_SECONDS = 10.0
"""From its first byte to its last."""
REQUEST_BYTES = 8 << 10
READ_BYTES = 4 << 10

log = structlog.get_logger()


@dataclass(frozen=True)
class Page:
    """An answer: HTTP's status, and a body of that type."""

    body: bytes
    status: int = 200
    kind: str = "text/plain; charset=utf-8"
    allow: str = ""


Pages = Mapping[str, Callable[[], Awaitable[Page]]]


class Exporter:
    """Serves pages by their paths."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._asking: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._loopback = False

    @property
    def port(self) -> int:
        """Where it listens; 0 if nowhere."""
        return int(self._server.sockets[0].getsockname()[1]) if self._server else 0

    async def start(self, listen: str) -> None:
        """Listen there (`qmp_upm.listen`). ConfigError if the port is taken."""
        where = split_listen(listen)
        if where is None:
            return
        host, port = where
        try:
            self._server = await asyncio.start_server(
                self._accept, host, port, limit=REQUEST_BYTES, backlog=CONNECTIONS_MOST
            )
        except OSError as error:
            raise ConfigError(
                f"metrics.listen: cannot listen on {listen}: {error.strerror}",
                hint="another program, or another qmp-upm, may have it: choose another port, "
                'or "" for none',
            ) from error
        self._loopback = ipaddress.ip_address(host).is_loopback
        if not self._loopback:
            log.warning(
                "metrics-not-on-loopback",
                listen=listen,
                hint="whoever reaches this port can read the VMs' names and figures",
            )

    async def close(self) -> None:
        """Stop, and cut off who is connected."""
        if self._server is None:
            return
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MOST:
            if not self._asking:
                writer.transport.abort()
                return
            oldest = next(iter(self._asking))
            del self._asking[oldest]
            oldest.transport.abort()
        self._asking[writer] = None
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONNECTION_SECONDS):
                writer.write(await self._answer(reader, writer))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError):
            # A client that is slow or gone is nobody's trouble but its own.
            log.debug("metrics-client-lost")
        finally:
            self._asking.pop(writer, None)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES)
        try:
            async with asyncio.timeout(ASK_SECONDS):
                request = await _read_request(http, reader)
            self._asking.pop(writer, None)
        except h11.RemoteProtocolError as error:
            return _encode(http, Page(b"", error.error_status_hint), head=False)
        return _encode(http, await self._page(request), head=request.method == b"HEAD")

    async def _page(self, request: h11.Request) -> Page:
        if request.method not in (b"GET", b"HEAD"):
            return Page(b"only GET and HEAD\n", 405, allow="GET, HEAD")
        if self._loopback and not _is_local(request):
            return Page(b"ask for an address of this host, or for localhost\n", 421)
        path = request.target.split(b"?", 1)[0].decode("ascii", "replace")
        if path not in self._pages:
            return Page("\n".join(self._pages).encode() + b"\n", 404)
        try:
            return await self._pages[path]()
        except Exception:  # a page's defect is not the daemon's end, nor is it hidden
            log.exception("page-failed", page=path, hint="report this")
            return Page(b"see the daemon's log\n", 500)


def _is_local(request: h11.Request) -> bool:
    """Whether it is for an address, or for a name that only this host gives itself."""
    headers: dict[bytes, bytes] = dict(request.headers)
    host = headers.get(b"host", b"localhost").decode("ascii", "replace").lower()
    name = host[1:].partition("]")[0] if host[:1] == "[" else host.partition(":")[0]
    if name in ("localhost", socket.gethostname().lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _read_request(http: h11.Connection, reader: asyncio.StreamReader) -> h11.Request:
    while True:
        event = http.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            raise ConnectionError("the client closed")
        http.receive_data(await reader.read(READ_BYTES))


def _encode(http: h11.Connection, page: Page, *, head: bool) -> bytes:
    headers = [
        ("Content-Type", page.kind),
        ("Content-Length", str(len(page.body))),
        ("Connection", "close"),
    ]
    if page.allow:
        headers.append(("Allow", page.allow))
    events: list[h11.Event] = [h11.Response(status_code=page.status, headers=headers)]
    if not head:
        events.append(h11.Data(data=page.body))
    return b"".join(http.send(event) or b"" for event in [*events, h11.EndOfMessage()])
