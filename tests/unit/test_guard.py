"""The guard: what gets through, what does not, and how a refusal looks."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Scope

from core.settings import Settings
from service import guard
from service.api.errors import HANDLERS
from service.guard import Guard, is_loopback
from service.metrics import REQUESTS

pytestmark = pytest.mark.anyio


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


# -- keys ----------------------------------------------------------------------------------------

GOOD = ["Bearer s3cret", "bearer s3cret", "BEARER   s3cret "]
BAD = ["", "s3cret", "Basic s3cret", "Bearer", "Bearer ", "Bearer wrong", "Bearer s3cret2",
       "Bearer s3cre", "Bearer S3CRET", "Token s3cret"]  # fmt: skip


@pytest.mark.parametrize("header", GOOD)
async def test_the_right_key_opens(header: str):
    async with client("s3cret") as http:
        assert (await http.get("/echo", headers={"Authorization": header})).status_code == 200


@pytest.mark.parametrize("header", BAD)
@pytest.mark.parametrize("path", ["/echo", "/v1/files", "/bug", "/nowhere", "/livez/", "//livez"])
async def test_any_other_does_not(header: str, path: str):
    async with client("s3cret") as http:
        response = await http.get(path, headers={"Authorization": header})
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "s3cret" not in response.text
    assert message(response)


@pytest.mark.parametrize("key", ["schlüssel", "ключ", "🔑"])
async def test_a_key_beyond_ascii(key: str):
    async with client(key) as http:
        right = await http.get("/echo", headers={"Authorization": f"Bearer {key}".encode()})
        wrong = await http.get("/echo", headers={"Authorization": f"Bearer {key}x".encode()})
        junk = await http.get("/echo", headers={"Authorization": b"Bearer \xff\xfe"})
    assert [right.status_code, wrong.status_code, junk.status_code] == [200, 401, 401]


async def test_with_a_key_the_host_and_the_address_do_not_matter():
    async with client("s3cret", server=("10.0.0.1", 80)) as http:
        headers = {"Authorization": "Bearer s3cret", "Host": "graft.example", "Origin": "http://x"}
        assert (await http.get("/echo", headers=headers)).status_code == 200


@pytest.mark.parametrize("key", [None, "s3cret"])
async def test_the_probes_are_open(key: str | None):
    async with client(key, server=("10.0.0.1", 80)) as http:
        assert (await http.get("/livez", headers={"Host": "evil.example"})).text == "live"


# -- without a key: this machine only ------------------------------------------------------------

LOOPBACK = ["127.0.0.1", "127.0.0.1:3000", "localhost", "localhost:3000", "LOCALHOST:1", "[::1]",
            "[::1]:3000", "127.9.9.9"]  # fmt: skip
FOREIGN = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:3000", "10.0.0.1",
           "0.0.0.0", "[::]", "127.0.0.1@evil.example", "", "::1:x", "localhost:"]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
async def test_a_loopback_host_gets_through(host: str):
    async with client() as http:
        assert (await http.get("/echo", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
async def test_a_rebound_name_does_not(host: str):
    async with client() as http:
        response = await http.get("/echo", headers={"Host": host})
    assert response.status_code == 401
    assert "GRAFT_API_KEY" in message(response)


@pytest.mark.parametrize("server", [("10.0.0.1", 3000), ("0.0.0.0", 3000), None, ("/x.sock", None)])
async def test_a_connection_from_elsewhere_does_not(server: object):
    async with client(server=server) as http:
        assert (await http.get("/echo")).status_code == 401


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:3000", 200), ("http://localhost:5173", 200), ("http://[::1]", 200),
        ("https://evil.example", 401), ("null", 401), ("", 401), ("http://[", 401),
        ("http://localhost.evil.example", 401), ("http://localhost@evil.example", 401),
    ],
)  # fmt: skip
async def test_only_pages_of_this_machine_may_post(origin: str, status: int):
    async with client() as http:
        response = await http.post("/echo", content=b"x", headers={"Origin": origin})
    assert response.status_code == status


@given(st.text(max_size=60))
def test_no_name_but_loopback_is_loopback(name: str):
    if is_loopback(name):
        assert name.lower() == "localhost" or re.match(r"\[*(127\.|0*:|::)", name)


# -- bodies --------------------------------------------------------------------------------------


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


# -- ids, bugs, metrics --------------------------------------------------------------------------


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
