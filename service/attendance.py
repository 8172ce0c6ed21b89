"""This service process among the others: it says that it lives, and which new versions it serves.

So a job can tell when its model is served (training.acknowledgement). Lost or late words cost that
line in its history, never a request. Not here: loading (service.hot_loader).
"""

from __future__ import annotations

import asyncio

from core.changes import Change
from core.presence import Presence, Role, keep_presence, process_name
from service.serving_set import ModelState


class Attendance:
    """One process's presence and acknowledgements."""

    def __init__(self, presence: Presence) -> None:
        self._presence = presence
        self._process = process_name()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to say that the process lives."""
        self._task = asyncio.create_task(keep_presence(self._presence, Role.SERVICE, self._process))

    async def close(self) -> None:
        """Say that it lives no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def acknowledge(self, change: Change, state: ModelState | None) -> None:
        """Answer a published version, loaded or refused; may raise `Unavailable`."""
        if change.type != "published" or change.version is None or state is None:
            return
        if change.version in state.versions or change.version in state.refused:
            await self._presence.acknowledge(
                change.tenant, change.model, change.version, self._process,
                serves=change.version in state.versions,
            )  # fmt: skip
