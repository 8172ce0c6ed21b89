"""What endpoints share: bodies and parameters read strictly, and callers that go away noticed."""

from __future__ import annotations

import asyncio
from typing import Annotated

import pytest
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope

from core.errors import InvalidRequest, Overloaded, UnsupportedMedia
from service.api import jobs
from service.api.responses import query_int, read_body, read_json, while_connected

pytestmark = pytest.mark.anyio


class Body(BaseModel):
    name: str


class Listed(BaseModel):
    names: Annotated[tuple[str, ...], Field(min_length=1)]


def receiver(*messages: Message) -> Receive:
    """Give the messages, and then wait for ever."""
    waiting = iter(messages)

    async def receive() -> Message:
        for message in waiting:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def request(
    body: bytes = b"", query: str = "", content_type: bytes | None = None, *more: Message
) -> Request:
    headers = [] if content_type is None else [(b"content-type", content_type)]
    scope: Scope = {
        "type": "http", "method": "POST", "path": "/", "headers": headers,
        "query_string": query.encode(),
    }  # fmt: skip
    first = {"type": "http.request", "body": body, "more_body": False}
    return Request(scope, receiver(first, *more))


@pytest.mark.parametrize("kind", [None, b"application/json", b"Application/JSON; charset=utf-8"])
async def test_a_body_is_read(kind: bytes | None):
    assert (await read_body(request(b'{"name": "x"}', "", kind), Body)).name == "x"


@pytest.mark.parametrize("kind", [b"text/plain", b"application/jsonp", b"multipart/form-data"])
async def test_only_json_is_json(kind: bytes):
    with pytest.raises(UnsupportedMedia):
        await read_json(request(b"{}", "", kind))


async def test_what_is_wrong_with_a_body_is_said():
    with pytest.raises(InvalidRequest, match="line 2, column 3"):
        await read_json(request(b"{\n  x"))
    with pytest.raises(InvalidRequest, match="name: ") as refused:
        await read_body(request(b"{}"), Body)
    assert refused.value.param == "name"
    with pytest.raises(InvalidRequest, match=r"a JSON object$"):
        await read_body(request(b"[]"), Body)


@pytest.mark.parametrize(("names", "said"), [(b'"low"', "a valid list$"), (b"[]", "^names: List ")])
async def test_a_list_is_called_a_list(names: bytes, said: str):
    with pytest.raises(InvalidRequest, match=said):
        await read_body(request(b'{"names": ' + names + b"}"), Listed)


@pytest.mark.parametrize(
    ("query", "expected"), [("", 20), ("n=1", 1), ("n=100", 100), ("n=007", 7)]
)
def test_a_number_of_the_query(query: str, expected: int):
    assert query_int(request(b"", query), "n", 20, low=1, high=100) == expected


@pytest.mark.parametrize(
    "query",
    ["n=", "n=0", "n=101", "n=-1", "n=1.0", "n=x", "n=%C2%B2", "n=%D9%A3", "n=" + "9" * 5000,
     "n=000000001000000000"],
)  # fmt: skip
def test_no_number_outside_its_bounds(query: str):
    with pytest.raises(InvalidRequest):
        query_int(request(b"", query), "n", 20, low=1, high=100)


async def test_work_for_a_caller_that_has_gone_is_cancelled():
    asked = request(b"{}", "", None, {"type": "http.disconnect"})
    await asked.body()
    cancelled = False

    async def work() -> None:
        nonlocal cancelled
        async with while_connected(asked):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled = True
                raise

    task = asyncio.create_task(work())
    done, _ = await asyncio.wait([task], timeout=10)
    assert done
    assert cancelled
    assert isinstance(task.exception(), ClientDisconnect)


async def test_work_for_a_caller_that_waits_is_done_and_nothing_is_left_behind():
    before = len(asyncio.all_tasks())
    asked = request(b"{}")
    await asked.body()
    async with while_connected(asked):
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0)


async def test_a_cancellation_from_elsewhere_stays_one():
    asked = request(b"{}")
    await asked.body()

    async def work() -> None:
        async with while_connected(asked):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_event_streams_are_bounded_and_their_places_come_back(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jobs, "_STREAMS", asyncio.Semaphore(1))
    opened, close = asyncio.Event(), asyncio.Event()

    async def events():  # type: ignore[no-untyped-def]
        opened.set()
        await close.wait()
        yield b"data: x\n\n"

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    def run(stream: Response) -> asyncio.Task[None]:
        return asyncio.create_task(stream(request().scope, receiver(), send))

    first = run(jobs.EventStream(events()))
    async with asyncio.timeout(10):
        await opened.wait()
        with pytest.raises(Overloaded) as refused:
            await run(jobs.EventStream(events()))
        assert refused.value.retry_after_seconds > 0
        assert len([each for each in sent if each["type"] == "http.response.start"]) == 1
        close.set()
        await first
        await run(jobs.EventStream(events()))
