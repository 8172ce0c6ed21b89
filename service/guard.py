"""What every request passes first, BentoML's own routes included.

    observe ─▶ may it? (service.access) ─▶ bounded body and time ─▶ our routes, or BentoML's

It gives the request an id, counts and logs the answer, and makes sure that not even a bug answers
with a trace. Around it is only what BentoML has for traces, which is off, and what `service.app`
takes out. `/livez` and `/readyz` need no key and are answered here.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import DeadlineExceeded, GraftError, NotFound
from core.settings import Settings
from service.access import Access
from service.api.errors import error_response, log_bug, unexpected
from service.api.responses import require_json
from service.caller import CALLER, read_caller
from service.metrics import request_meters
from service.observation import RECORD, RequestRecord
from service.request_body import BoundedBody
from service.request_log import RequestLog
from service.tracing import Tracing

OPEN_PATHS = frozenset({"/livez", "/readyz"})
OUR_PATHS = ("/v1/", "/v2/")
UPLOAD_PATHS = frozenset({"/v1/files"})
BENTOML_PATHS = frozenset({"/predict", "/embed"})
"""API methods of BentoML's, which answers 500 to a damaged form; their clients send JSON."""
ANSWER_SECONDS = 300.0
"""How long a request may take until its answer begins."""
UPLOAD_SECONDS = 1800.0
"""The same for an upload: the largest by default, at 2.5 Mbit/s."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Guard:
    """ASGI middleware around the whole of BentoML's application."""

    def __init__(
        self, app: ASGIApp, settings: Settings, health: ASGIApp, api: ASGIApp | None = None
    ) -> None:
        self._app = app
        self._health = health
        self._api = api or app
        self._access = Access(settings)
        self._log = RequestLog(settings.request_log_fraction)
        self._tracing = Tracing.open(settings)
        self._max_body = settings.max_request_bytes
        # A multipart upload holds the file and little else.
        self._max_upload = settings.max_upload_bytes + (1 << 20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._observe(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _observe(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request under an id, and measure, count and log it however it ends."""
        began = time.monotonic()
        headers = _headers(scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        record = RequestRecord(request_id)
        RECORD.set(record)
        answer = _Answer(send, request_id)
        is_upload = scope["path"] in UPLOAD_PATHS
        body = BoundedBody(receive, self._max_upload if is_upload else self._max_body)
        patience = asyncio.timeout(UPLOAD_SECONDS if is_upload else ANSWER_SECONDS)
        try:
            await self._serve(scope, headers, body, answer, patience)
        except Exception as error:
            if answer.is_complete:
                return
            if answer.has_begun:
                raise  # the server closes the connection, so that the caller sees the answer is cut
            late = DeadlineExceeded("the request took too long") if patience.expired() else None
            refusal = _refusal(body.refusal or late or error, scope)
            await refusal(scope, receive, answer.send)
        finally:
            # Starlette leaves the matched route in the scope; a raw path is never a label.
            record.route = getattr(scope.get("route"), "path", "other")
            record.method = scope["method"] if scope["method"] in _METHODS else "other"
            record.status = answer.status
            seconds = time.monotonic() - began
            requests, request_seconds = request_meters(record.method, record.route, record.status)
            requests.inc()
            request_seconds.observe(seconds)
            self._log.write(record, seconds)
            if self._tracing is not None:
                self._tracing.record(record, headers.get("traceparent"), began)

    async def _serve(
        self, scope: Scope, headers: Mapping[str, str], body: BoundedBody, answer: _Answer,
        patience: asyncio.Timeout,
    ) -> None:  # fmt: skip
        """Pass a request on if it may; raises what it is refused with."""
        if scope["path"] in OPEN_PATHS:
            await self._health(scope, body.receive, answer.send)
            return
        self._access.require(scope, headers)
        CALLER.set(read_caller(headers, scope["state"]["request_id"]))
        body.check_declared(headers)
        if scope["path"] in BENTOML_PATHS:
            require_json(headers)
        refusal: GraftError | None = None

        async def respond(message: Message) -> None:
            nonlocal refusal
            # BentoML's endpoints turn what reading the body raises into a 500; ours is the answer,
            # as it is to what its API methods refuse (service.app).
            refusal = refusal or body.refusal or _no_endpoint(scope, message)
            if refusal is None and "answer" not in scope["state"]:
                if not answer.has_begun and not patience.expired():
                    patience.reschedule(None)  # a stream of events has no end
                await answer.send(message)

        # On the way through BentoML's own layers a request costs a fifth more.
        app = self._api if scope["path"].startswith(OUR_PATHS) else self._app
        async with patience:
            await app(scope, body.receive, respond)
        if refusal is not None:
            raise refusal
        if "answer" in scope["state"]:
            await scope["state"]["answer"](scope, body.receive, answer.send)


def _refusal(error: Exception, scope: Scope) -> ASGIApp:
    """Return the answer to a request that failed; a bug is logged."""
    if not isinstance(error, GraftError):
        log_bug(scope, error)
        error = unexpected()
    return error_response(error, scope["path"])


def _headers(scope: Scope) -> dict[str, str]:
    """Return the headers, of repeated ones the first: they are looked up often, and by name."""
    return {
        name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"][::-1]
    }


def _no_endpoint(scope: Scope, message: Message) -> NotFound | None:
    """Return our error for BentoML's answer, in plain text, to a path or a method it has not."""
    if message["type"] != "http.response.start" or message["status"] not in (404, 405):
        return None
    if not Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain"):
        return None
    return NotFound(f"no endpoint {scope['method'][:20]} {scope['path'][:200]}")


class _Answer:
    """Passes an answer on with the request's id, and remembers how far it got."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status = 500
        self.has_begun = False
        self.is_complete = False
        self._send = send
        self._request_id = request_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self._request_id
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True
        await self._send(message)
