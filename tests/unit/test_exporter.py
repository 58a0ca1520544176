# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages over HTTP, and clients that mean no good."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import structlog

from qmp_upm import exporter
from qmp_upm.errors import ConfigError
from qmp_upm.exporter import CONNECTIONS_MOST, Exporter, Page
from qmp_upm.listen import split_listen


async def hello() -> Page:
    """A page."""
    return Page(b"hello\n")


async def big() -> Page:
    """One that no socket takes at once."""
    return Page(b"x" * (64 << 20))


@pytest.fixture
async def server() -> AsyncIterator[Exporter]:
    """On a free port of loopback."""
    made = Exporter({"/hello": hello, "/big": big})
    await made.start("127.0.0.1:0")
    yield made
    await made.close()


async def ask(server: Exporter, request: bytes) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    answer = await rest_of(reader)
    writer.close()
    return answer


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes, or cuts the connection off."""
    parts = []
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionResetError):
            while part := await reader.read(1 << 16):
                parts.append(part)
    return b"".join(parts)


GET = b"GET /hello HTTP/1.1\r\nHost: [::1]:1\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (GET, b"200", b"hello\n"),
        (b"GET /hello?x=1 HTTP/1.0\r\n\r\n", b"200", b"hello\n"),
        (b"HEAD /hello HTTP/1.1\r\nHost: [::1]:1\r\n\r\n", b"200", b""),
        (b"GET / HTTP/1.1\r\nHost: [::1]:1\r\n\r\n", b"404", b"/hello\n/big\n"),
        (
            b"POST /hello HTTP/1.1\r\nHost: [::1]:1\r\nContent-Length: 0\r\n\r\n",
            b"405",
            b"only GET",
        ),
        (b"GET /hello HTTP/1.1\r\n\r\n", b"400", b""),
        (b"\0\xff\r\n\r\n", b"400", b""),
        (b"GET /hello HTTP/1.1\r\nHost: " + b"x" * 9000, b"431", b""),
    ],
    ids=["get", "old", "head", "unknown", "post", "no-host", "garbage", "huge"],
)
async def test_answers(server: Exporter, request_: bytes, status: bytes, body: bytes) -> None:
    """Each request has the answer that HTTP has for it."""
    head, _, rest = (await ask(server, request_)).partition(b"\r\n\r\n")
    assert head.split(b" ", 2)[1] == status
    assert rest.startswith(body) if body else rest == b""


async def test_slow_clients_are_cut_off(server: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never finishes asking, and one that never reads: both are gone after their time."""
    monkeypatch.setattr(exporter, "CONNECTION_SECONDS", 0.05)
    asks, asking = await asyncio.open_connection("127.0.0.1", server.port)
    asking.write(b"GET /hello HT")
    reads, reading = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
    reading.write(GET.replace(b"hello", b"big"))
    async with asyncio.timeout(20):
        assert await rest_of(asks) == b""
        while server._connections:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.001)
    asking.close()
    reading.close()
    assert (await ask(server, GET)).endswith(b"hello\n")
    del reads


async def test_those_who_do_not_ask_keep_nobody_out(server: Exporter) -> None:
    """For one more the one that has waited longest is closed: 30 of 30 requests are answered."""
    held = [
        await asyncio.open_connection("127.0.0.1", server.port) for _ in range(CONNECTIONS_MOST)
    ]
    async with asyncio.timeout(20):
        while len(server._connections) < CONNECTIONS_MOST:  # noqa: ASYNC110 - the same
            await asyncio.sleep(0.001)
        for _ in range(30):
            assert (await ask(server, GET)).endswith(b"hello\n")
            held.append(await asyncio.open_connection("127.0.0.1", server.port))
            await asyncio.sleep(0)
        assert len(server._connections) <= CONNECTIONS_MOST + 1
        for _, writer in held:
            writer.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:9469", 200), ("LOCALHOST", 200), ("[::1]", 200), ("evil.example:9469", 421)],
)
async def test_a_name_of_somebody_elses_is_not_this_host(
    server: Exporter, host: str, status: int
) -> None:
    """A browser's page that has its own name lead to loopback reads nothing here."""
    request = f"GET /hello HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    assert (await ask(server, request)).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.traceback
async def test_a_page_that_fails_is_an_error() -> None:
    """The client is told, the log has why, and the next one is served."""

    async def fails() -> Page:
        raise KeyError("oops")

    server = Exporter({"/fails": fails, "/hello": hello})
    await server.start("127.0.0.1:0")
    with structlog.testing.capture_logs() as logs:
        answer = await ask(server, GET.replace(b"hello", b"fails"))
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert [line["event"] for line in logs] == ["page-failed"]
    assert (await ask(server, GET)).endswith(b"hello\n")
    await server.close()


async def test_closing_leaves_no_connection() -> None:
    """Who is still connected is cut off."""
    server = Exporter({"/hello": hello})
    await server.start("127.0.0.1:0")
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(20):
        while not server._connections:  # noqa: ASYNC110 - the same
            await asyncio.sleep(0.001)
        await server.close()
        assert await rest_of(reader) == b""
    writer.close()


async def test_a_taken_port_is_a_configuration_error() -> None:
    """With what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            await Exporter({}).start(f"127.0.0.1:{port}")
    assert str(port) in caught.value.message
    assert "another port" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "where"),
    [("", None), ("127.0.0.1:9469", ("127.0.0.1", 9469)), ("[::1]:80", ("::1", 80))],
)
def test_where_to_listen(text: str, where: tuple[str, int] | None) -> None:
    """An address and a port, or nowhere."""
    assert split_listen(text) == where


@pytest.mark.parametrize(
    "text", [":9469", "9469", "localhost:9469", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1"]
)
def test_where_not_to_listen(text: str) -> None:
    """Not on every network by omission, nor at a name."""
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9469"):
        split_listen(text)


async def test_another_address_is_said() -> None:
    """Whoever opens the port to a network finds it in the log."""
    server = Exporter({})
    with structlog.testing.capture_logs() as logs:
        await server.start("0.0.0.0:0")
    await server.close()
    assert [line["event"] for line in logs] == ["metrics-not-on-loopback"]
