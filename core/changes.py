"""The change feed: how service processes hear of a new, moved or removed model.

A change is a hint to look, never the truth: the registry holds that, and a service process that
missed every change finds them all when it next polls. The feed is one bounded Redis stream,
`<prefix>:{graft}:changes`. Writers: `JobQueue.announce` (fenced) and `ChangeFeed.publish`.
"""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import BaseModel

FEED_LENGTH = 1_000


class Change(BaseModel, frozen=True):
    """A hint that one model of one tenant changed in the registry."""

    tenant: str
    model: str
    type: Literal["published", "released", "deleted"]
    version: int | None = None


class ChangeFeed(Protocol):
    """Both methods may raise `Unavailable`."""

    async def publish(self, change: Change) -> None:
        """Append a change; readers see it at once."""

    async def follow(self, cursor: str | None, timeout_seconds: float) -> tuple[str, list[Change]]:
        """Return (new cursor, changes behind `cursor`), waiting up to the timeout for the first.

        With `cursor=None` return the current end of the feed and no changes.
        """
