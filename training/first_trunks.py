"""Trunks of the packaged backbones, exported while a worker has nothing else to do.

Without them `/v1/embeddings` has to wait for the first job on a backbone, and that job for the
export. It is done in a process of its own, of the lowest priority, one backbone after the other; a
job that comes ends it at once, and it begins again when the worker is idle. Workers that do it at
the same time store the same content. Not here: exporting (training.trunks).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from core.backbones import BACKBONES
from core.errors import Unavailable
from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from training.backbones.sources import is_installed
from training.process import child_environment, end_with_supervisor

logger = logging.getLogger("graft.worker")

IDLE_SECONDS = 5.0
LOOK_SECONDS = 0.2
LOWEST_PRIORITY = 19


async def export_when_idle(
    registry: Registry, is_idle: Callable[[], bool], stopping: asyncio.Event
) -> None:
    """Export what is missing, then return.

    A backbone whose package is not installed, or that cannot be exported, is left out.
    """
    for backbone, row in BACKBONES.items():
        if not is_installed(row):
            continue
        while not stopping.is_set():
            if await _stays_idle(is_idle, stopping) and await _is_done(
                registry, backbone, is_idle, stopping
            ):
                break


async def _stays_idle(is_idle: Callable[[], bool], stopping: asyncio.Event) -> bool:
    for _ in range(round(IDLE_SECONDS / LOOK_SECONDS)):
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), LOOK_SECONDS)
        if stopping.is_set() or not is_idle():
            return False
    return True


async def _is_done(
    registry: Registry, backbone: str, is_idle: Callable[[], bool], stopping: asyncio.Event
) -> bool:
    """Export one backbone if it is missing; False if it is to be tried again."""
    try:
        if await asyncio.to_thread(registry.newest_trunk, backbone) is not None:
            return True
    except Unavailable:
        return False
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "training.first_trunks", backbone,
        stdin=asyncio.subprocess.DEVNULL, env=child_environment(), start_new_session=True,
    )  # fmt: skip
    ended = asyncio.create_task(process.wait())
    try:
        while not ended.done() and is_idle() and not stopping.is_set():
            await asyncio.wait({ended}, timeout=LOOK_SECONDS)
        if not ended.done():
            return False
        if process.returncode:
            logger.error("the trunk of %s could not be exported ahead of its jobs", backbone)
        else:
            logger.info("the trunk of %s is exported", backbone)
        return True
    finally:
        if not ended.done():
            with suppress(ProcessLookupError):
                process.kill()
        await ended


def main() -> None:
    """Export the backbone given as the first argument."""
    end_with_supervisor()
    os.nice(LOWEST_PRIORITY)
    from training.trunks import ensure_trunk

    settings = Settings()
    ensure_trunk(
        Registry(ArtifactStore(settings.store_url)), sys.argv[1], hf_models=(), threads=1,
        max_pixels=settings.max_pixels, on_export=lambda: None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
