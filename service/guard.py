"""What every request passes first, BentoML's own routes included: the outermost ASGI layer.

It gives the request an id, checks the key, bounds the body, counts the answer, and makes sure that
not even a bug answers with a trace. `/livez` and `/readyz` need no key and are answered here.

Without a key the service is for its own machine only: the connection must have come to a loopback
address and the `Host` header must name one, so that a page in a browser that has its name rebound
to 127.0.0.1 gets nothing. That the socket is bound to loopback is checked at start (service.app).
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import time
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import GraftError, PayloadTooLarge, Unauthorized
from core.settings import Settings
from service.api.errors import error_response
from service.metrics import REQUEST_SECONDS, REQUESTS

OPEN_PATHS = frozenset({"/livez", "/readyz"})
UPLOAD_PATHS = frozenset({"/v1/files"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware around the whole of BentoML's application."""

    def __init__(self, app: ASGIApp, settings: Settings, health: ASGIApp) -> None:
        self._app = app
        self._health = health
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
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 500
        body = _BoundedBody(receive, self._limit(scope["path"]))

        async def respond(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        async def respond_unless_too_large(message: Message) -> None:
            # BentoML's endpoints turn what reading the body raises into a 500; ours is the answer.
            if not body.is_too_large:
                await respond(message)

        try:
            if scope["path"] in OPEN_PATHS:
                await self._health(scope, receive, respond)
                return
            self._authorise(scope, headers)
            body.check_declared(headers)
            with suppress(PayloadTooLarge):
                await self._app(scope, body.receive, respond_unless_too_large)
            body.check()
        except GraftError as error:
            await error_response(error)(scope, receive, respond)
        finally:
            # Starlette leaves the matched route in the scope; a raw path is never a label.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            REQUESTS.labels(method=method, route=route, status=str(status)).inc()
            REQUEST_SECONDS.labels(route=route).observe(time.perf_counter() - started)

    def _authorise(self, scope: Scope, headers: Headers) -> None:
        if self._key is None:
            address, _ = scope.get("server") or ("", 0)
            host = re.sub(r":\d+\Z", "", headers.get("host", "localhost"))
            if not (is_loopback(address or "") and is_loopback(host)):
                raise Unauthorized("set GRAFT_API_KEY to serve other machines than this one")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
            raise Unauthorized("send the API key as 'Authorization: Bearer …'")

    def _limit(self, path: str) -> int:
        return self._max_upload if path in UPLOAD_PATHS else self._max_body


class _BoundedBody:
    """A request body that ends in `PayloadTooLarge` when more comes than is allowed."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._received = 0

    @property
    def is_too_large(self) -> bool:
        return self._received > self._limit

    def check(self) -> None:
        if self.is_too_large:
            raise PayloadTooLarge(f"the body is larger than {self._limit} bytes")

    def check_declared(self, headers: Headers) -> None:
        declared = headers.get("content-length", "0")
        if declared.isdigit():
            self._received = int(declared)
            self.check()
            self._received = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self.check()
        return message
