"""Removes what crashes left in the artifact store, so that nothing temporary stays.

An ended job's resume states go when it is archived, and so do its checkpoints if it was cancelled,
unless the one who cancelled asked to keep the best; those of a job that succeeded or failed stay,
for they are models that can be used. The rest is found by listing the store (training.leftovers).

It is safe against whoever is slow instead of dead. Nothing of a job goes that Redis or the store
does not know to have ended; a job that neither knows can hold no lease. A version that goes leaves
a tombstone first, so that a writer that wakes later cannot list what is left of it. And a leftover
must have looked the same for an age, by this process's monotonic clock: no host's wall clock can
shorten it. Several workers may collect at once.
Not here: what an object store keeps of broken-off uploads; its lifecycle rule removes that.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from core.checkpoints import Checkpoints
from core.errors import GraftError, NotFound
from core.files import FileStore
from core.jobs import Job
from core.queue import JobQueue
from core.registry import SHARED_FOLDERS, Registry
from core.runs import RunStore
from core.store import ArtifactStore
from training.leftovers import Leftover, find_leftovers

logger = logging.getLogger("graft.worker")

MAX_ROUND_SECONDS = 600.0
MAX_REMOVED = 500
MAX_WATCHED = 100_000


async def keep_collected(
    queue: JobQueue, store: ArtifactStore, stopping: asyncio.Event, age_seconds: float
) -> None:
    """Collect every so often, until the worker stops; workers that began together drift apart."""
    collector = Collector(queue, store, age_seconds=age_seconds)
    while not stopping.is_set():
        pause = min(MAX_ROUND_SECONDS, age_seconds / 2) * random.uniform(0.7, 1)  # noqa: S311
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), pause)
            return
        try:
            await collector.collect()
        except GraftError as error:
            logger.warning("leftovers are not collected: %s", error.message)
        except Exception:
            logger.exception("leftovers are not collected")


class Collector:
    """Remembers what it has seen, and removes what has not changed for an age."""

    def __init__(self, queue: JobQueue, store: ArtifactStore, *, age_seconds: float) -> None:
        self._queue = queue
        self._store = store
        self._age_seconds = age_seconds
        self._registry = Registry(store)
        self._runs = RunStore(store)
        self._seen: dict[tuple[str, Leftover], tuple[float, float]] = {}

    async def collect(self) -> int:
        """Look through the store once; return how many leftovers were removed, a bounded number."""
        removed = 0
        for tenant, leftover in await asyncio.to_thread(self._due):
            if await self._collect(tenant, leftover):
                logger.info("removed a leftover of a crash: %s %s", tenant, leftover)
                removed += 1
            if removed == MAX_REMOVED:
                break
        return removed

    def _due(self) -> list[tuple[str, Leftover]]:
        """Return what has looked the same for long enough."""
        now = time.monotonic()
        # What is not watched this time is in another round, when what is watched now has gone.
        found = dict(islice(self._find(), MAX_WATCHED))
        before, self._seen = self._seen, {}
        for key, newest in found.items():
            known, since = before.get(key, (newest, now))
            self._seen[key] = (newest, since if known == newest else now)
        return [key for key, (_, since) in self._seen.items() if now - since >= self._age_seconds]

    def _find(self) -> Iterator[tuple[tuple[str, Leftover], float]]:
        tenants = self._registry.tenants()
        for tenant in tenants:
            for leftover, newest in find_leftovers(self._store.walk(tenant)):
                yield (tenant, leftover), newest
        for folder in (*tenants, *sorted(SHARED_FOLDERS)):
            for entry in self._store.staged(folder):
                # A writer at work changes its size before the time has a new second.
                yield (folder, Leftover("staged", entry.key, entry.bytes)), entry.modified_at

    async def _collect(self, tenant: str, leftover: Leftover) -> bool:
        kind, name, number = leftover
        match kind:
            case "staged":
                await asyncio.to_thread(self._store.drop_staged, name)
            case "upload":
                return await asyncio.to_thread(self._discard, FileStore(self._store, tenant), name)
            case "run":
                return await self._clear(tenant, name)
            case "version":
                return await self._bury(tenant, name, number)
        return True

    @staticmethod
    def _discard(files: FileStore, file_id: str) -> bool:
        with suppress(NotFound):
            files.get(file_id)
            return False  # it was completed after all
        files.discard(file_id)
        return True

    async def _clear(self, tenant: str, job_id: str) -> bool:
        job = await self._job(tenant, job_id)
        if job is None:
            checkpoints = Checkpoints(self._store, tenant, job_id)
            await asyncio.to_thread(checkpoints.drop_states)
            await asyncio.to_thread(checkpoints.drop)
            return True
        if not job.status.is_terminal:
            return False
        await asyncio.to_thread(self._runs.tidy, job)
        return True

    async def _bury(self, tenant: str, name: str, number: int) -> bool:
        version = (tenant, name, number)
        owner = await asyncio.to_thread(self._registry.owner, *version)
        job = await self._job(tenant, owner) if owner else None
        if job is not None and not job.status.is_terminal:
            return False
        if await asyncio.to_thread(self._registry.is_listed, *version):
            return False  # between the look and now, which its job's end came after
        await asyncio.to_thread(self._registry.bury, *version)
        return True

    async def _job(self, tenant: str, job_id: str) -> Job | None:
        """Return a job from Redis or from the archive; None if it is known to neither."""
        job = await self._queue.get(tenant, job_id)
        return job or await asyncio.to_thread(self._runs.get, tenant, job_id)
