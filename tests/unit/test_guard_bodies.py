"""The guard: request bodies are bounded in size and in how long they may pause."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.types import Message, Scope

from core.settings import Settings
from service import guard
from service.guard import Guard
from tests.guarded import BARE, HEALTH, OURS, client, message

pytestmark = pytest.mark.anyio


async def chunked(size: int) -> AsyncIterator[bytes]:
    for begin in range(0, size, 100):
        yield b"x" * min(100, size - begin)


@pytest.mark.parametrize("path", ["/echo", "/swallow"])
@pytest.mark.parametrize("app", [OURS, BARE])
@pytest.mark.parametrize("size", [0, 1024, 1025, 5000])
@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_is_bounded_whether_declared_or_not(
    path: str, app: Starlette, size: int, declared: bool
):
    async with client(app=app) as http:
        content = b"x" * size if declared else chunked(size)
        response = await http.post(path, content=content)
    if size <= 1024:
        assert (response.status_code, response.text) == (200, str(size))
    else:
        assert response.status_code == 413
        assert "1024 bytes" in message(response)


async def test_an_upload_has_its_own_bound():
    async with client() as http:
        limit = 4096 + (1 << 20)
        assert (await http.post("/v1/files", content=b"x" * limit)).status_code == 200
        assert (await http.post("/v1/files", content=b"x" * (limit + 1))).status_code == 413


@pytest.mark.parametrize("declared", ["²", "-1", "1e9", "0x10", "", "9" * 5000])
async def test_an_odd_content_length_does_no_harm(declared: str):
    async with client() as http:
        headers = {"Content-Length": declared.encode("latin-1")}
        response = await http.post("/echo", content=chunked(10), headers=headers)
    assert response.status_code in (200, 413)


async def test_a_body_that_stops_coming_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "STALL_SECONDS", 0.02)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    for path in ("/echo", "/swallow"):
        async with client() as http:
            response = await http.post(path, content=stalled())
        assert response.status_code == 504
        assert "stopped coming" in message(response)


async def test_only_the_body_is_timed_not_the_wait_behind_it(monkeypatch: pytest.MonkeyPatch):
    """An event stream waits for the caller to go away, for as long as it takes."""
    monkeypatch.setattr(guard, "STALL_SECONDS", 0.01)
    waited = False

    async def app(scope: Scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        nonlocal waited
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        waited = True
        await PlainTextResponse("late")(scope, receive, send)

    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        try:
            return next(messages)
        except StopIteration:
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

    async def send(_: Message) -> None: ...

    scope: Scope = {
        "type": "http", "path": "/x", "method": "GET", "headers": [], "server": ("127.0.0.1", 1),
    }  # fmt: skip
    await Guard(app, Settings(api_key=None), HEALTH)(scope, receive, send)
    assert waited
