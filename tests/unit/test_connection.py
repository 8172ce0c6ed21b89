"""A connection that never becomes a request costs little, and not for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn import Config
from uvicorn.server import ServerState

from service import connection
from service.connection import MAX_HEAD_BYTES, Connection

pytestmark = pytest.mark.anyio
HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


async def echo(request: Request) -> Response:
    return Response(await request.body())


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of its own."""
    app = Starlette(routes=[Route("/", echo, methods=["POST"])])
    config = Config(app, http=Connection, lifespan="off", log_config=None)
    config.load()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(config, ServerState(), {}), "127.0.0.1", 0
    )
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            yield reader, writer
        finally:
            writer.close()


async def sent_without_end(writer: asyncio.StreamWriter, piece: bytes) -> int:
    """Send until the other side has closed, or far too much was taken; return the bytes."""
    sent = 0
    while sent < 100 * MAX_HEAD_BYTES:
        try:
            writer.write(piece)
            await writer.drain()
        except ConnectionError:
            break
        sent += len(piece)
    return sent


@pytest.mark.parametrize(
    "begin",
    [b"GET /", HEAD + b"X-Long: ", HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
     HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x="],
    ids=["path", "header", "trailer", "chunk-extension"],
)  # fmt: skip
async def test_what_comes_without_end_is_given_up(begin: bytes):
    async with asyncio.timeout(30), connected() as (_, writer):
        writer.write(begin)
        # What the sockets of both sides hold comes on top.
        assert await sent_without_end(writer, b"a" * 65_536) < 100 * MAX_HEAD_BYTES


async def test_many_small_headers_are_given_up_as_one_large():
    async with asyncio.timeout(30), connected() as (_, writer):
        writer.write(HEAD)
        assert await sent_without_end(writer, b"a: b\r\n" * 10_000) < 100 * MAX_HEAD_BYTES


@pytest.mark.parametrize("begin", [b"P", HEAD], ids=["one byte", "half a head"])
async def test_what_stops_coming_is_given_up(monkeypatch: pytest.MonkeyPatch, begin: bytes):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)
    async with asyncio.timeout(30), connected() as (reader, writer):
        writer.write(begin)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.endswith(b"took too long.")


async def test_who_asks_nothing_is_told_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.05)
    async with asyncio.timeout(30), connected() as (reader, _):
        assert await reader.read() == b""


async def test_large_bodies_one_after_the_other_are_answered():
    body = b"b" * (3 * MAX_HEAD_BYTES)
    async with asyncio.timeout(30), connected() as (reader, writer):
        for _ in range(3):
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(body)) == body


async def test_a_request_that_is_being_answered_is_not_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.02)
    async with asyncio.timeout(30), connected() as (reader, writer):
        chunk = HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
        for piece in (chunk, b"0", b"\r\n\r\n"):
            writer.write(piece)
            await asyncio.sleep(0.1)  # what must not happen can only be waited for
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(1) == b"a"
