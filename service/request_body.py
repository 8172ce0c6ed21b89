"""The body of a request, bounded in size and in how long it may pause."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Message, Receive

from core.errors import DeadlineExceeded, GraftError, PayloadTooLarge

STALL_SECONDS = 60.0
"""How long a request body may pause."""


class BoundedBody:
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
        """Raise `PayloadTooLarge` if the headers announce more than the limit."""
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit():
            self._check(int(declared[:18]))

    async def receive(self) -> Message:
        """Return the next message, as the server gives it; raises `refusal`."""
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
