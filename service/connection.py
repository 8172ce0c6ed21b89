"""What a connection may cost before it is a request: bounds of bytes and of time on its head.

Uvicorn's parser keeps a head until it is whole, however long that takes and however much comes, and
nothing that needs a request, the key included, can look at it before. So a caller who sends without
end, or stops halfway, is given up here. The same holds for what may follow a body (trailers) or
stand between its chunks. Not here: the body itself, and all else about a request (service.guard).

BentoML has no option for it; `service.app` puts the class into uvicorn's table of protocols.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""How much of a head may wait for the rest; one that comes in a single read may be longer."""
HEAD_SECONDS = 30.0
"""How long a head may take, from the connection or its first byte."""


class Connection(HttpToolsProtocol):
    """Uvicorn's HTTP connection, bounded until it has a request."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._unparsed = 0  # bytes since the last that made a request or were of its body
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and give up when that led to nothing for too long."""
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES:
            self._give_up("The head of the request is too large.")
        elif self._unparsed and self._timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        """There is a request."""
        self._advance()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """There is more of its body."""
        self._advance()
        super().on_body(body)

    def _advance(self) -> None:
        self._unparsed = 0
        self._stop_timer()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        # An odd line end behind a request must not end its answer.
        if not self._is_answering:
            self._give_up("The head of the request took too long.")

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _give_up(self, message: str) -> None:
        # Who has asked for nothing must not take this for the answer to what is on its way.
        if self._is_answering or not self._unparsed or self.transport.is_closing():
            self.transport.close()
        else:
            self.send_400_response(message)
