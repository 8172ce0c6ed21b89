"""Waiting until those who serve have taken up a version, so that a job's history can tell.

The wait is short and never holds up a job for a service process that is gone: then the history has
the true numbers. Not here: who is live (core.presence), and loading (service.hot_loader).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from core.errors import Unavailable
from core.presence import Presence, Role

WAIT_SECONDS = 2.0
"""Several times what loading a head takes; a process that is slower is told as missing."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Acknowledgement:
    """How many of the live service processes serve a version, refused it, and live at all."""

    acknowledged: int
    refused: int
    of: int


async def wait_served(
    presence: Presence, tenant: str, model: str, version: int
) -> Acknowledgement | None:
    """Return when all live service processes have spoken, or after the wait.

    None when no service process lives, or when Redis cannot tell.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    told = None
    try:
        while True:
            live = await presence.live(Role.SERVICE)
            if not live:
                return None
            spoke = await presence.acknowledged(tenant, model, version)
            serving = sum(spoke.get(process, False) for process in live)
            refused = sum(process in spoke for process in live) - serving
            told = Acknowledgement(serving, refused, len(live))
            if serving + refused == len(live) or time.monotonic() > deadline:
                return told
            await asyncio.sleep(POLL_SECONDS)
    except Unavailable:
        return told
