"""What every request passes first, BentoML's own routes included.

It gives the request an id, checks the key, bounds the body and the time, counts the answer, and
makes sure that not even a bug answers with a trace. Around it is only what BentoML has for traces,
which is off, and what `service.app` takes out. `/livez` and `/readyz` need no key and are answered
here.

Without a key the service is for its own machine only: the connection must have come to a loopback
address, and the `Host` header must name one, so that a page in a browser that has its name rebound
to 127.0.0.1 gets nothing; so must `Origin`, so that other sites' pages cannot post here. That the
socket is bound to loopback is checked at start (service.app).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import DeadlineExceeded, GraftError, NotFound, PayloadTooLarge, Unauthorized
from core.settings import Settings
from service.api.errors import error_response, log_bug, unexpected
from service.api.responses import require_json
from service.caller import CALLER, read_caller
from service.metrics import request_meters
from service.observation import RECORD, RequestRecord
from service.request_log import RequestLog
from service.tracing import Tracing

OPEN_PATHS = frozenset({"/livez", "/readyz"})
OUR_PATHS = ("/v1/", "/v2/")
UPLOAD_PATHS = frozenset({"/v1/files"})
BENTOML_PATHS = frozenset({"/predict", "/embed"})
"""API methods of BentoML's, which answers 500 to a damaged form; their clients send JSON."""
STALL_SECONDS = 60.0
"""How long a request body may pause."""
ANSWER_SECONDS = 300.0
"""How long a request may take until its answer begins."""
UPLOAD_SECONDS = 1800.0
"""The same for an upload: the largest by default, at 2.5 Mbit/s."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Tell whether a host name or address means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware around the whole of BentoML's application."""

    def __init__(
        self, app: ASGIApp, settings: Settings, health: ASGIApp, api: ASGIApp | None = None
    ) -> None:
        self._app = app
        self._health = health
        self._api = api or app
        self._log = RequestLog(settings.request_log_fraction)
        self._tracing = Tracing.open(settings)
        self._key = settings.api_key.get_secret_value().encode() if settings.api_key else None
        self._max_body = settings.max_request_bytes
        # A multipart upload holds the file and little else.
        self._max_upload = settings.max_upload_bytes + (1 << 20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.monotonic()
        record = RequestRecord(request_id)
        RECORD.set(record)
        body = _BoundedBody(receive, self._limit(scope["path"]))
        answer = _Answer(send, request_id)
        is_upload = scope["path"] in UPLOAD_PATHS
        patience = asyncio.timeout(UPLOAD_SECONDS if is_upload else ANSWER_SECONDS)

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

        try:
            if scope["path"] in OPEN_PATHS:
                await self._health(scope, receive, answer.send)
            else:
                self._authorise(scope, headers)
                CALLER.set(read_caller(headers, request_id))
                body.check_declared(headers)
                if scope["path"] in BENTOML_PATHS:
                    require_json(headers)
                # On the way through BentoML's own layers a request costs a fifth more.
                is_ours = scope["path"].startswith(OUR_PATHS)
                app = self._api if is_ours else self._app
                async with patience:
                    await app(scope, body.receive, respond)
                if refusal is not None:
                    raise refusal
                if "answer" in scope["state"]:
                    await scope["state"]["answer"](scope, receive, answer.send)
        except Exception as error:
            late = DeadlineExceeded("the request took too long") if patience.expired() else None
            if not answer.has_begun:
                await self._refuse(body.refusal or late or error, scope, receive, answer.send)
            elif not answer.is_complete:
                raise  # the server closes the connection, so that the caller sees the answer is cut
        finally:
            # Starlette leaves the matched route in the scope; a raw path is never a label.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            seconds = time.monotonic() - began
            requests, request_seconds = request_meters(method, route, answer.status)
            requests.inc()
            request_seconds.observe(seconds)
            record.method, record.route, record.status = method, route, answer.status
            self._log.write(record, seconds)
            if self._tracing is not None:
                self._tracing.record(record, headers.get("traceparent"), began)

    async def _refuse(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if not isinstance(error, GraftError):
            log_bug(scope, error)
            error = unexpected()
        await error_response(error, scope["path"])(scope, receive, send)

    def _authorise(self, scope: Scope, headers: Mapping[str, str]) -> None:
        if self._key is None:
            address, _ = scope.get("server") or ("", 0)
            host = re.sub(r":\d+\Z", "", headers.get("host", "localhost"))
            if not (is_loopback(address or "") and is_loopback(host) and _is_own_page(headers)):
                raise Unauthorized("set GRAFT_API_KEY to serve other machines than this one")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Headers come as Latin-1, whatever bytes the caller sent.
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            key.strip().encode("latin-1"), self._key
        ):
            raise Unauthorized("send the API key as 'Authorization: Bearer …'")

    def _limit(self, path: str) -> int:
        return self._max_upload if path in UPLOAD_PATHS else self._max_body


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


def _is_own_page(headers: Mapping[str, str]) -> bool:
    """Tell whether a browser sent this for a page of this machine; other programs name no origin.

    A page of any site may post a form, or text, to 127.0.0.1 without being asked for permission.
    """
    origin = headers.get("origin")
    if origin is None:
        return True
    with suppress(ValueError):
        return is_loopback(urlsplit(origin).hostname or "")
    return False


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


class _BoundedBody:
    """A request body that ends in an error when it grows too large, or stops coming.

    `refusal` is that error: whoever reads the body may catch it, but it stays the answer.
    """

    def __init__(self, receive: Receive, limit: int) -> None:
        self.refusal: GraftError | None = None
        self._receive = receive
        self._limit = limit
        self._received = 0
        self._has_ended = False

    def check_declared(self, headers: Mapping[str, str]) -> None:
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit():
            self._check(int(declared[:18]))

    async def receive(self) -> Message:
        if self._has_ended:
            return await self._receive()  # the next thing to come is that the caller goes away
        try:
            async with asyncio.timeout(STALL_SECONDS):
                message = await self._receive()
        except TimeoutError:
            self.refusal = DeadlineExceeded("the body stopped coming")
            raise self.refusal from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._has_ended = not message.get("more_body", False)
            self._check(self._received)
        return message

    def _check(self, size: int) -> None:
        if size > self._limit:
            self.refusal = PayloadTooLarge(f"the body is larger than {self._limit} bytes")
            raise self.refusal
