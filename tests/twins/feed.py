"""The change feed of one process and one event loop."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from core.changes import Change, ChangeFeed


class MemoryChangeFeed(ChangeFeed):
    """Keeps every change; see `ChangeFeed` for what each method promises."""

    def __init__(self) -> None:
        self._changes: list[Change] = []
        self._appended = asyncio.Event()

    async def publish(self, change: Change) -> None:
        """Append a change; readers see it at once."""
        self._changes.append(change)
        self._appended.set()
        self._appended = asyncio.Event()

    async def follow(self, cursor: str | None, timeout_seconds: float) -> tuple[str, list[Change]]:
        """Return (new cursor, changes behind `cursor`), waiting up to the timeout for the first."""
        if cursor is not None and int(cursor) >= len(self._changes):
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self._appended.wait()
        end = len(self._changes)
        return str(end), [] if cursor is None else self._changes[int(cursor) : end]
