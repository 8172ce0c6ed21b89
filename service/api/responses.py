"""JSON in and out, and where an endpoint finds what it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from core.errors import InvalidRequest, UnsupportedMedia

Body = TypeVar("Body", bound=BaseModel)

UNWATCHED_SECONDS = 0.02
"""How long a caller may be gone before it is noticed."""


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with JSON."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def media_type(headers: Mapping[str, str]) -> str:
    """Return the content type without its parameters, in lower case."""
    return headers.get("content-type", "").split(";")[0].strip().lower()


def require_json(headers: Mapping[str, str]) -> None:
    """Raise `UnsupportedMedia` for a body that is said to be anything but JSON."""
    content_type = media_type(headers)
    if content_type not in ("", "application/json"):
        raise UnsupportedMedia(f"send application/json, not {content_type[:60]!r}")


async def read_json(request: Request) -> Any:
    """Return the parsed body; raise `UnsupportedMedia` or `InvalidRequest`."""
    require_json(request.headers)
    try:
        return orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None


async def read_body(request: Request, model: type[Body]) -> Body:
    """Return the body as `model`; raise `InvalidRequest` naming every field at fault."""
    return validated(model, await read_json(request))


def validated(model: type[Body], content: Any) -> Body:
    """Return parsed JSON as `model`; raise `InvalidRequest` naming every field at fault."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise invalid_body(error) from None


def invalid_body(error: ValidationError) -> InvalidRequest:
    """Turn pydantic's findings into one sentence that names each field."""
    found = field_errors(error)
    shown = "; ".join(f"{name}: {message}" for name, message in found[:10])
    return InvalidRequest(shown, param=found[0][0].split(".")[0])


def field_errors(error: ValidationError) -> list[tuple[str, str]]:
    """Return each field at fault, as `outer.inner`, and what is wrong with it."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # A name may be the caller's own, as of a field that does not exist, and as long as the body.
    return [
        (".".join(str(part)[:60] for part in item["loc"]) or "body", _what_is_wrong(item))
        for item in found
    ]


def _what_is_wrong(item: ErrorDetails) -> str:
    # Pydantic names our classes, and Python's, which tell a caller nothing.
    if item["type"] == "model_type":
        return "Input should be a JSON object"
    said = item["msg"].removeprefix("Value error, ")
    return said.replace("valid tuple", "valid list").replace("Tuple should", "List should")


def query_int(request: Request, name: str, default: int, *, low: int, high: int) -> int:
    """Return an integer of the query string; raise `InvalidRequest` outside low..high."""
    text = request.query_params.get(name)
    if text is None:
        return default
    is_number = text.isascii() and text.isdigit() and len(text) <= 9
    if not is_number or not low <= int(text) <= high:
        raise InvalidRequest(f"{name} must be an integer from {low} to {high}", param=name)
    return int(text)


def query_bool(request: Request, name: str) -> bool:
    """Return a flag of the query string, false when absent; raise `InvalidRequest` for others."""
    text = request.query_params.get(name, "false")
    if text not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return text == "true"


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancel what the block awaits, and raise `ClientDisconnect`, when the caller goes away.

    The body must have been read before.
    """
    task = asyncio.current_task()
    assert task is not None
    has_gone = False

    async def watch() -> None:
        nonlocal has_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_gone = True
        task.cancel()

    watcher: asyncio.Task[None] | None = None

    def begin() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    # Most answers are there before; a task for each would cost more than it saves.
    timer = asyncio.get_running_loop().call_later(UNWATCHED_SECONDS, begin)
    try:
        yield
    except asyncio.CancelledError:
        if has_gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
