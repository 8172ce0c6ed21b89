"""The guard: what every answer carries, and what a bug looks like from outside."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from starlette.applications import Starlette
from starlette.types import Message, Scope

from core.settings import Settings
from service.guard import Guard
from service.metrics import REQUESTS
from tests.guarded import BARE, HEALTH, OURS, client, message

pytestmark = pytest.mark.anyio


async def test_a_good_request_id_comes_back():
    async with client() as http:
        response = await http.get("/echo", headers={"X-Request-Id": "abc-1.2_3"})
        assert response.headers["X-Request-Id"] == "abc-1.2_3"


@pytest.mark.parametrize("given_id", ["", "a b", "a" * 129, "é", "a\tb", "<script>", "a;b"])
async def test_any_other_is_replaced(given_id: str):
    async with client() as http:
        headers = {"X-Request-Id": given_id.encode()}
        ids = {(await http.get("/echo", headers=headers)).headers["X-Request-Id"] for _ in "ab"}
    assert len(ids) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in ids)


async def test_every_answer_has_one_refusals_too():
    async with client("s3cret") as http:
        for path in ("/livez", "/echo", "/nowhere"):
            assert "X-Request-Id" in (await http.get(path)).headers


@pytest.mark.parametrize("app", [OURS, BARE])
async def test_a_bug_is_a_500_that_tells_nothing(app: Starlette, caplog: pytest.LogCaptureFixture):
    async with client(app=app) as http:
        response = await http.get("/bug", headers={"X-Request-Id": "r-77"})
    assert response.status_code == 500
    assert "secret" not in response.text
    if app is OURS:
        assert response.json()["error"]["type"] == "server_error"
        assert "r-77" in caplog.text
        assert "the secret is 42" in caplog.text


async def test_a_bug_in_the_middle_of_an_answer_reaches_the_server_which_cuts_it():
    guarded = Guard(OURS, Settings(api_key=None), HEALTH)
    scope: Scope = {
        "type": "http", "path": "/stream", "method": "GET", "headers": [], "query_string": b"",
        "server": ("127.0.0.1", 1),
    }  # fmt: skip
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(RuntimeError):
        await guarded(scope, receive, send)
    assert [each.get("body") for each in sent] == [None, b"one"]


def labels() -> set[tuple[str, ...]]:
    return {
        (sample.labels["method"], sample.labels["route"], sample.labels["status"])
        for metric in REQUESTS.collect()
        for sample in metric.samples
    }


async def test_metrics_know_routes_and_not_paths():
    before = labels()
    async with client() as http:
        for n in range(20):
            await http.get(f"/things/{n}")
            await http.get(f"/nowhere-{n}")
            await http.request(f"METHOD{n}", "/echo")
    new = labels() - before
    assert ("GET", "/things/{thing}", "200") in new
    assert all(not re.search(r"\d", method + route) for method, route, _ in new)
    assert len(new) <= 4


async def test_errors_of_our_router_are_json():
    async with client() as http:
        missing = await http.get("/nowhere")
        wrong = await http.delete("/echo")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert message(missing) == "Not Found: GET /nowhere"
    assert message(wrong) == "Method Not Allowed: DELETE /echo"
    assert "POST" in wrong.headers["Allow"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/nowhere"), ("DELETE", "/echo")])
async def test_errors_of_bentomls_router_become_json(method: str, path: str):
    async with client(app=BARE) as http:
        response = await http.request(method, path)
    assert response.status_code == 404
    assert message(response) == f"no endpoint {method} {path}"


async def test_a_websocket_is_closed():
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await Guard(OURS, Settings(api_key=None), HEALTH)({"type": "websocket"}, receive, send)
    assert [each["type"] for each in sent] == ["websocket.close"]


async def test_the_body_of_a_refusal_is_json():
    async with client("k") as http:
        response = await http.post("/v1/files", content=b"x" * 10)
    assert json.loads(response.content)["error"]["code"] == "invalid_api_key"
