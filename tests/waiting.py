"""Waiting for something to become true, always with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(check: Callable[[], T | None], seconds: float = 20, what: str = "it") -> T:
    """Return the first result of `check` that is neither None nor False, within a deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = check()
        if found is not None and found is not False:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Let the event loop run until the condition holds, within a deadline."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
