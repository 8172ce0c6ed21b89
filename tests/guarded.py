"""A small application behind the guard, and a client for it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Scope

from core.settings import Settings
from service.api.errors import HANDLERS
from service.guard import Guard


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def swallow(request: Request) -> PlainTextResponse:
    """As BentoML's endpoints do: whatever reading the body raises becomes a 500."""
    try:
        return PlainTextResponse(str(len(await request.body())))
    except Exception as error:
        return PlainTextResponse(f"trace: {error!r}", 500)


async def bug(_: Request) -> PlainTextResponse:
    raise RuntimeError("the secret is 42")


async def broken_stream(_: Request) -> StreamingResponse:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"one"
        raise RuntimeError("the secret is 42")

    return StreamingResponse(chunks())


ROUTES = [
    Route("/echo", echo, methods=["GET", "POST"]),
    Route("/v1/files", echo, methods=["POST"]),
    Route("/swallow", swallow, methods=["POST"]),
    Route("/bug", bug),
    Route("/stream", broken_stream),
    Route("/things/{thing}", echo),
]
OURS = Starlette(routes=ROUTES, exception_handlers=HANDLERS)
BARE = Starlette(routes=ROUTES)
HEALTH = Starlette(routes=[Route("/livez", lambda _: PlainTextResponse("live"))])


def client(key: str | None = None, app: Starlette = OURS, **transport: object) -> httpx.AsyncClient:
    settings = Settings(api_key=key, max_request_bytes=1024, max_upload_bytes=4096)
    wrapped = Guard(app, settings, HEALTH)

    async def with_server(scope: Scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        server = transport.get("server", ("127.0.0.1", 3000))
        await wrapped({**scope, "server": server}, receive, send)

    return httpx.AsyncClient(
        transport=httpx.ASGITransport(with_server, raise_app_exceptions=False),
        base_url="http://127.0.0.1:3000",
    )


def message(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["message"])
