"""Fine-tune jobs wherever they are: Redis first, then the artifact store.

Redis may have forgotten a finished job, because its retention is over or because it came back
empty. A worker has archived it by then (training.archive), so that a caller sees no difference: the
same record, the same events with the same ids, the same place in the list.

Not here: how a job looks over HTTP (service.api.jobs).
"""

from __future__ import annotations

import asyncio
import builtins
import time
from dataclasses import dataclass

from core.datasets import UploadedFile
from core.errors import InvalidRequest, NotFound
from core.jobs import Job, JobEvent, JobKind, event_order
from core.queue import JobQueue
from core.runs import Place, RunStore, parse_result_file_id, result_file_ids
from service.reads import read_each

INDEX_SECONDS = 10.0
"""How old the list of archived jobs may be: shorter than Redis keeps a job that was archived."""
SCAN = 100
RESULTS_PURPOSE = "fine-tune-results"


@dataclass(frozen=True)
class ResultFile:
    """A file that a job made, and its content."""

    file: UploadedFile
    data: bytes


class JobHistory:
    """Reads jobs and their events; may raise `Unavailable`."""

    def __init__(
        self, queue: JobQueue, runs: RunStore, *, index_seconds: float = INDEX_SECONDS
    ) -> None:
        self._queue = queue
        self._runs = runs
        self._index_seconds = index_seconds
        self._indexes: dict[str, tuple[float, list[Place]]] = {}

    async def get(self, tenant: str, job_id: str) -> Job | None:
        """Return the job, or None."""
        job = await self._queue.get(tenant, job_id)
        if job is None:
            job = await asyncio.to_thread(self._runs.get, tenant, job_id)
        return job if job is not None and job.kind is JobKind.FINE_TUNE else None

    async def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20
    ) -> builtins.list[Job]:
        """Return up to `limit` jobs, newest first, beginning behind the job `after`.

        Raises `InvalidRequest` when there is no job `after`. At most `limit` records are read from
        the store.
        """
        start = None if after is None else await self.get(tenant, after)
        if after is not None and start is None:
            raise InvalidRequest("no such job to list after", param="after")
        page = await self._in_redis(tenant, start, limit)
        known = {job.id for job in page}
        # A full page of Redis holds all of Redis down to its last job, and nothing older belongs.
        oldest = Place.of(page[-1]) if len(page) >= limit else Place(0, "")
        places = [
            place
            for place in await self._archived(tenant)
            if place > oldest
            and (start is None or place < Place.of(start))
            and place.id not in known
        ][:limit]
        records = await read_each(lambda place: self._runs.get(tenant, place.id), places)
        page += [job for job in records if job is not None]
        return sorted(page, key=Place.of, reverse=True)[:limit]

    async def events(
        self, job: Job, *, after: str | None = None, limit: int = 100, newest_first: bool = False
    ) -> builtins.list[JobEvent]:
        """Return events strictly behind `after` in the chosen direction."""
        events = await self._queue.events(
            job.tenant, job.id, after=after, limit=limit, newest_first=newest_first
        )
        if events or not job.status.is_terminal:
            return events
        return (await self._kept_events(job, after, newest_first))[:limit]

    async def wait_events(
        self, job: Job, after: str | None, timeout_seconds: float
    ) -> builtins.list[JobEvent]:
        """Return the events behind `after`, oldest first, waiting for the first if none.

        The history of a job that has ended is complete: nothing in it is worth waiting for.
        """
        wait = 0 if job.status.is_terminal else timeout_seconds
        events = await self._queue.wait_events(job.tenant, job.id, after, wait)
        if events or not job.status.is_terminal:
            return events
        return await self._kept_events(job, after, newest_first=False)

    async def result_file(self, tenant: str, file_id: str) -> ResultFile | None:
        """Return a finished job's metrics or report, or None if the id is not of such a file."""
        parsed = parse_result_file_id(file_id)
        job = await self.get(tenant, parsed[0]) if parsed else None
        if parsed is None or job is None or file_id not in result_file_ids(job).values():
            return None
        name = parsed[1]
        try:
            data = await asyncio.to_thread(self._runs.result, tenant, job.id, name)
        except NotFound:
            # Redis still has the job alone: what will be archived is made of the same.
            events = await self._queue.wait_events(tenant, job.id, None, 0)
            data = (await asyncio.to_thread(self._runs.results, job, events))[name]
        file = UploadedFile(
            id=file_id,
            filename=f"{job.id}-{name}",
            bytes=len(data),
            created_at=job.finished_at or job.created_at,
            purpose=RESULTS_PURPOSE,
        )
        return ResultFile(file, data)

    async def _in_redis(self, tenant: str, start: Job | None, limit: int) -> builtins.list[Job]:
        """Return the page of jobs that Redis has; `start` itself may be in the store alone."""
        kind = JobKind.FINE_TUNE
        page = await self._queue.list(tenant, kind, after=start.id if start else None, limit=limit)
        if page or start is None or await self._queue.get(tenant, start.id) is not None:
            return page
        after = None
        while len(page) < limit and (
            scanned := await self._queue.list(tenant, kind, after=after, limit=SCAN)
        ):
            page += [job for job in scanned if Place.of(job) < Place.of(start)]
            after = scanned[-1].id
        return page[:limit]

    async def _archived(self, tenant: str) -> builtins.list[Place]:
        read_at, places = self._indexes.get(tenant, (float("-inf"), []))
        if time.monotonic() - read_at > self._index_seconds:
            read_at = time.monotonic()
            places = await asyncio.to_thread(self._runs.places, tenant)
            self._indexes[tenant] = read_at, places
        return places

    async def _kept_events(
        self, job: Job, after: str | None, newest_first: bool
    ) -> builtins.list[JobEvent]:
        events = await asyncio.to_thread(self._runs.events, job.tenant, job.id)
        if newest_first:
            events.reverse()
        if after is None:
            return events
        bound = event_order(after)
        return [
            event
            for event in events
            if (event_order(event.id) < bound if newest_first else event_order(event.id) > bound)
        ]
