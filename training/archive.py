"""Keeps finished jobs: moves what Redis knows of them into the artifact store, and tidies up.

Every end of a job, whoever brought it about, puts it among the queue's `unarchived`; any worker
writes it to the store (core.runs), removes what only a running job needs, and only then marks it,
so that a crash in between costs nothing but doing it again. Of a parsing job that failed the file
tells, or it would be parsed again once Redis has forgotten. Several workers may do it at once. Not
here: reading them (service.job_history), what crashes leave (training.collection).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from core.errors import GraftError
from core.jobs import Job, JobEvent
from core.queue import JobQueue
from core.runs import RunStore

logger = logging.getLogger("graft.worker")

POLL_SECONDS = 1.0
MAX_PAUSE_SECONDS = 60.0
PAGE = 1_000


async def keep_archive(queue: JobQueue, runs: RunStore, stopping: asyncio.Event) -> None:
    """Archive jobs as they end, until the worker stops; while that fails, ever more rarely."""
    pause = POLL_SECONDS
    while not stopping.is_set():
        failed = await archive_finished(queue, runs)
        pause = min(MAX_PAUSE_SECONDS, 2 * pause) if failed else POLL_SECONDS
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), pause)


async def archive_finished(queue: JobQueue, runs: RunStore) -> bool:
    """Archive what has ended; return whether anything went wrong. One job never stops others."""
    try:
        # Page by page; one with a failure in it is seen again, so it is the last.
        while jobs := await queue.unarchived():
            if await _archive_page(queue, runs, jobs):
                return True
    except GraftError as error:
        logger.warning("finished jobs are not archived: %s", error.message)
        return True
    return False


async def _archive_page(queue: JobQueue, runs: RunStore, jobs: Sequence[Job]) -> bool:
    failed = False
    for job in jobs:
        try:
            await asyncio.to_thread(runs.archive, job, await _history(queue, job))
            await asyncio.to_thread(runs.tidy, job)
            await queue.mark_archived(job)
        except GraftError as error:
            logger.warning("%s is not archived: %s", job.id, error.message)
            failed = True
        except Exception:
            logger.exception("%s is not archived", job.id)
            failed = True
    return failed


async def _history(queue: JobQueue, job: Job) -> list[JobEvent]:
    events: list[JobEvent] = []
    after = None
    while page := await queue.events(job.tenant, job.id, after=after, limit=PAGE):
        events += page
        after = page[-1].id
    return events
