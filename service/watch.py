"""Watching the registry: when the hot loader has to look, and at what.

It follows the change feed, and besides looks into the whole registry every `poll_seconds`, so a
lost change costs time, never a model. Not here: what looking does (service.hot_loader).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from core.changes import Change, ChangeFeed
from core.errors import NotFound, Unavailable
from service.hot_loader import HotLoader
from service.serving_set import ModelState

logger = logging.getLogger("graft.service")

FEED_WAIT_SECONDS = 2.0
RETRY_SECONDS = 1.0
POLL_SHARE = 0.05
"""Most of the time that looking may take: a registry of 10,000 models is listed in half a second,
so it is looked into every ten."""


class RegistryWatch:
    """Two tasks of one service process."""

    def __init__(
        self,
        loader: HotLoader,
        feed: ChangeFeed,
        *,
        poll_seconds: float,
        on_change: Callable[[Change, ModelState | None], Awaitable[None]] | None = None,
    ) -> None:
        """`on_change` is called with a change of the feed when the set is up to date with it."""
        self.hears_changes = False
        """True while the change feed answers."""
        self._loader = loader
        self._feed = feed
        self._poll_seconds = poll_seconds
        self._on_change = on_change
        self._cursor: str | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to follow the feed and to poll."""
        self._tasks = [
            asyncio.create_task(_forever(self._follow)),
            asyncio.create_task(_forever(self._poll)),
        ]

    async def close(self) -> None:
        """Look no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self) -> None:
        try:
            self._cursor, changes = await self._feed.follow(self._cursor, FEED_WAIT_SECONDS)
        except Unavailable:
            self.hears_changes = False
            raise
        self.hears_changes = True
        unloaded = [change for change in changes if change.type == "unloaded"]
        looked_at = [change for change in changes if change.type != "unloaded"]
        for tenant, model in dict.fromkeys((c.tenant, c.model) for c in looked_at):
            await self._loader.reconcile_model(tenant, model, retry=True)
        for change in unloaded:
            with suppress(NotFound):
                await self._loader.unload(change.tenant, change.model, change.version)
        if self._on_change is not None:
            models = self._loader.current.models
            for change in changes:
                await self._on_change(change, models.get((change.tenant, change.model)))

    async def _poll(self) -> None:
        began = time.monotonic()
        await self._loader.reconcile()
        took = time.monotonic() - began
        await asyncio.sleep(max(self._poll_seconds, took / POLL_SHARE))


async def _forever(step: Callable[[], Awaitable[None]]) -> None:
    """Repeat a step; what it raises is logged and tried again, so that no loop ever dies."""
    while True:
        try:
            await step()
        except Unavailable as error:
            logger.warning("%s", error.message)
            await asyncio.sleep(RETRY_SECONDS)
        except Exception:
            logger.exception("looking into the registry")
            await asyncio.sleep(RETRY_SECONDS)
