"""The guard: request bodies are bounded in size and in how long they may pause."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Scope

from core.settings import Settings
from service import guard, request_body
from service.guard import Guard
from service.metrics import REQUESTS
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
    monkeypatch.setattr(request_body, "STALL_SECONDS", 0.02)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    for path in ("/echo", "/swallow"):
        async with client() as http:
            response = await http.post(path, content=stalled())
        assert response.status_code == 504
        assert "stopped coming" in message(response)


@pytest.mark.parametrize("path", ["/echo", "/v1/files"])
async def test_a_body_that_never_ends_is_given_up(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(guard, "UPLOAD_SECONDS", 0.1)

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b""
            await asyncio.sleep(0.01)

    async with client() as http:
        response = await http.post(path, content=trickle(), headers={"X-Request-Id": "slow"})
    assert (response.status_code, message(response)) == (504, "the request took too long")
    assert response.headers["X-Request-Id"] == "slow"
    assert ("POST", path, "504") in {
        (sample.labels["method"], sample.labels["route"], sample.labels["status"])
        for metric in REQUESTS.collect()
        for sample in metric.samples
    }


async def test_an_answer_that_has_begun_may_take_its_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "ANSWER_SECONDS", 0.1)

    async def slow(_: Request) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b"x"
                await asyncio.sleep(0.03)

        return StreamingResponse(chunks())

    async with client(app=Starlette(routes=[Route("/slow", slow)])) as http:
        assert (await http.get("/slow")).text == "x" * 10


async def test_only_the_body_is_timed_not_the_wait_behind_it(monkeypatch: pytest.MonkeyPatch):
    """An event stream waits for the caller to go away, for as long as it takes."""
    monkeypatch.setattr(request_body, "STALL_SECONDS", 0.01)
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
