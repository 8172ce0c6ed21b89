"""JSON in and out, and where an endpoint finds what it needs."""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from core.errors import InvalidRequest, UnsupportedMedia

Body = TypeVar("Body", bound=BaseModel)


def json_response(content: Any, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(orjson.dumps(content), status, media_type="application/json")


async def read_json(request: Request) -> Any:
    """Return the parsed body; raise `UnsupportedMedia` or `InvalidRequest`."""
    content_type = request.headers.get("content-type", "application/json").split(";")[0].strip()
    if content_type != "application/json":
        raise UnsupportedMedia(f"send application/json, not {content_type[:60]!r}")
    try:
        return orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None


async def read_body(request: Request, model: type[Body]) -> Body:
    """Return the body as `model`; raise `InvalidRequest` naming every field at fault."""
    from service.api.errors import invalid_body

    try:
        return model.model_validate(await read_json(request))
    except ValidationError as error:
        raise invalid_body(error) from None


def query_int(request: Request, name: str, default: int, *, low: int, high: int) -> int:
    """Return an integer of the query string; raise `InvalidRequest` outside low..high."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or not low <= int(text[:9]) <= high:
        raise InvalidRequest(f"{name} must be an integer from {low} to {high}", param=name)
    return int(text)
