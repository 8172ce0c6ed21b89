"""The one table from errors to HTTP, and the shapes of an error.

`{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients expect, or `{"error": "…"}`
under `/v2`, as those of the Open Inference Protocol do. An error that is not of our tree is a bug:
it is logged with its trace and request id, and answered without either's
text.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from core import errors
from core.errors import GraftError, Overloaded
from service.api.responses import json_response

logger = logging.getLogger("graft.service")

# Most specific first: the first row that fits an error is used.
STATUS: tuple[tuple[type[GraftError], int, str], ...] = (
    (errors.PayloadTooLarge, 413, "invalid_request_error"),
    (errors.UnsupportedMedia, 415, "invalid_request_error"),
    (errors.InvalidRequest, 400, "invalid_request_error"),
    (errors.Unauthorized, 401, "authentication_error"),
    (errors.NotFound, 404, "invalid_request_error"),
    (errors.Conflict, 409, "invalid_request_error"),
    (errors.DeadlineExceeded, 504, "timeout_error"),
    (errors.Overloaded, 503, "overloaded_error"),
    (errors.Unavailable, 503, "unavailable_error"),
    (errors.NoSpace, 507, "unavailable_error"),
)

CLIENT_CLOSED_REQUEST = 499


def status_of(error: GraftError) -> tuple[int, str]:
    """Return the HTTP status and the OpenAI error type of an error."""
    for kind, status, type_ in STATUS:
        if isinstance(error, kind):
            return status, type_
    return 500, "server_error"


def of_row(error: GraftError, where: str, *, param: str | None) -> GraftError:
    """Return the error of a request that one row of made impossible.

    The caller's fault says which row; the service's own stays what it is, and may be retried.
    """
    if not isinstance(error, errors.InvalidRequest):
        return error
    message = f"{where}: {error.message}"
    return errors.InvalidRequest(message, param=param, code=error.error_code)


def error_body(error: GraftError) -> dict[str, Any]:
    """Return the inner object of an error answer."""
    return {
        "message": error.message,
        "type": status_of(error)[1],
        "param": error.param,
        "code": error.error_code,
    }


def error_response(error: GraftError, path: str = "") -> Response:
    """Answer a request to `path` with an error of our tree."""
    body = error.message if _is_v2(path) else error_body(error)
    response = json_response({"error": body}, status_of(error)[0])
    if isinstance(error, Overloaded):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    elif isinstance(error, errors.Unavailable) and not isinstance(error, errors.VersionRefused):
        response.headers["Retry-After"] = "1"
    elif isinstance(error, errors.Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _is_v2(path: str) -> bool:
    return path == "/v2" or path.startswith("/v2/")


async def no_endpoint(request: Request) -> Response:
    """Anything under `/v1` and `/v2` that no other route answers."""
    raise errors.NotFound(f"no endpoint {request.method} {request.url.path[:200]}")


async def on_graft_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for `GraftError`."""
    assert isinstance(error, GraftError)
    if status_of(error)[0] == 500:
        log_bug(request.scope, error)
    return error_response(error, request.scope.get("path", ""))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's handler for what its router refuses: an unknown path, or a method."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method[:20]} {request.url.path[:200]}"
    body = {
        "message": message,
        "type": "invalid_request_error",
        "param": None,
        "code": error.detail.lower().replace(" ", "_"),
    }
    shown = message if _is_v2(request.url.path) else body
    return json_response({"error": shown}, error.status_code, error.headers)


async def on_disconnect(_: Request, error: Exception) -> Response:
    """The caller has gone; nobody reads this, but the metrics do."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def on_bug(request: Request, error: Exception) -> Response:
    """Starlette's handler for everything else."""
    log_bug(request.scope, error)
    return error_response(unexpected(), request.scope.get("path", ""))


def unexpected() -> GraftError:
    """The answer to a bug."""
    return GraftError("an unexpected error; see the log under this request id")


def log_bug(scope: Scope, error: Exception) -> None:
    """Log an error's trace under the id of its request."""
    request_id = scope.get("state", {}).get("request_id")
    logger.error("request %s: unexpected error", request_id, exc_info=error)


HANDLERS: dict[Any, Any] = {
    GraftError: on_graft_error,
    HTTPException: on_http_exception,
    ClientDisconnect: on_disconnect,
    Exception: on_bug,
}
