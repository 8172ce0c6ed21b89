"""The change feed: how service processes hear of a new, moved or removed model.

A change is a hint to look, never the truth: the registry holds that, and a service process that
missed every change finds them all when it next polls. The feed is one bounded Redis stream,
`<prefix>:{graft}:changes`. Writers: `JobQueue.announce` (fenced) and `ChangeFeed.publish`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Literal, Protocol, cast

from pydantic import BaseModel, ValidationError
from redis.asyncio import Redis

from core.queue.connection import Entry, StreamReader, translated

FEED_LENGTH = 1_000


class Change(BaseModel, frozen=True):
    """A hint that one model of one tenant changed in the registry.

    Or that an operator wants it to be looked at again (`reloaded`), or out of memory (`unloaded`).
    """

    tenant: str
    model: str
    type: Literal["published", "released", "deleted", "reloaded", "unloaded"]
    version: int | None = None


class ChangeFeed(Protocol):
    """Both methods may raise `Unavailable`."""

    async def publish(self, change: Change) -> None:
        """Append a change; readers see it at once."""

    async def follow(self, cursor: str | None, timeout_seconds: float) -> tuple[str, list[Change]]:
        """Return (new cursor, changes behind `cursor`), waiting up to the timeout for the first.

        With `cursor=None` return the current end of the feed and no changes.
        """


class RedisChangeFeed(ChangeFeed):
    """The feed that all processes share."""

    def __init__(self, client: Redis, *, prefix: str) -> None:
        self._client = client
        self._stream = f"{prefix}:{{graft}}:changes"
        self._reader = StreamReader(client)

    async def publish(self, change: Change) -> None:
        """Append a change; readers see it at once."""
        with translated():
            await self._client.xadd(
                self._stream, {"change": change.model_dump_json()}, maxlen=FEED_LENGTH
            )

    async def follow(self, cursor: str | None, timeout_seconds: float) -> tuple[str, list[Change]]:
        """Return (new cursor, changes behind `cursor`), waiting up to the timeout for the first."""
        if cursor is None:
            with translated():
                last = cast(list[Entry], await self._client.xrevrange(self._stream, count=1))
            return (last[0][0] if last else "0-0"), []
        changes = []
        for entry_id, fields in await self._reader.read(self._stream, cursor, timeout_seconds):
            cursor = entry_id
            # What a newer release wrote must not stop an older reader at this entry for ever.
            with suppress(ValidationError, KeyError):
                changes.append(Change.model_validate_json(fields["change"]))
        return cursor, changes
