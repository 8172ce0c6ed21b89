"""What there is to see of the jobs in Redis; the rim that `core.queue.redis` builds on.

Plain reads are commands, and what needs several keys at one moment is a script. Not here: the keys
(core.queue.redis), and anything that changes a job.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, cast

from redis.asyncio import Redis

from core.jobs import Job, JobEvent, JobKind
from core.outlook import Estimate, Line, Outlook, Progress, Running
from core.queue.connection import Entry, StreamReader, translated
from core.queue.protocol import JobViews
from core.queue.records import decode_event, decode_job, require_event_id

OUTLOOK_LIMIT = 100
OUTLOOK_JOBS = 500
"""Pending jobs whose estimates are told, of all tenants."""


class RedisJobViews(JobViews):
    """Reads jobs and their events, and runs the queue's scripts."""

    def __init__(self, client: Redis, *, prefix: str) -> None:
        """`client` decodes its responses, as that of `core.queue.connection.connect` does."""
        self._client = client
        self._root = f"{prefix}:{{graft}}"
        self._reader = StreamReader(client)
        folder = files("core.queue").joinpath("lua")
        shared = folder.joinpath("job.lua").read_text("utf-8")
        self._scripts = {
            file.name.removesuffix(".lua"): client.register_script(
                shared + "\n" + file.read_text("utf-8")
            )
            for file in folder.iterdir()
            if file.name.endswith(".lua") and file.name != "job.lua"
        }

    async def get(self, tenant: str, job_id: str) -> Job | None:
        """Return the job, or None."""
        with translated():
            fields = await self._client.hgetall(self._key(tenant, "job", job_id))
        return decode_job(tenant, job_id, cast(dict[str, str], fields)) if fields else None

    async def position(self, job: Job) -> int | None:
        """How many jobs of the tenant and kind go before this queued one; None if not queued."""
        with translated():
            rank = await self._client.zrank(self._key(job.tenant, "pending", job.kind), job.id)
        return cast("int | None", rank)

    async def outlook(self, kind: JobKind) -> Outlook:
        """Return what a forecast is made from, of all tenants."""
        _, now, running, speeds, pending = await self._run(
            "outlook", kind, OUTLOOK_LIMIT, OUTLOOK_JOBS
        )
        return Outlook(
            now=float(now),
            running=tuple(
                Running(
                    id=running[n],
                    claimed_at=running[n + 1],
                    estimate=_estimate(running[n + 2]),
                    progress=_progress(running[n + 3]),
                )
                for n in range(0, len(running), 4)
            ),
            ratios=dict(zip(speeds[::2], map(_ratio, speeds[1::2]), strict=True)),
            pending={
                pending[n]: Line(count=pending[n + 1], first=tuple(map(_estimate, pending[n + 2])))
                for n in range(0, len(pending), 3)
            },
        )

    async def waiters(self, job: Job, limit: int = 100) -> builtins.list[Job]:
        """Return jobs that wait for this one and have no estimate yet."""
        _, found = await self._run("waiters", job.tenant, job.id, limit)
        return [
            decode_job(job.tenant, job_id, fields)
            for job_id, fields in zip(found[::2], found[1::2], strict=True)
        ]

    async def events(
        self,
        tenant: str,
        job_id: str,
        *,
        after: str | None = None,
        limit: int = 100,
        newest_first: bool = False,
    ) -> list[JobEvent]:
        """Return events strictly behind `after` in the chosen direction."""
        stream = self._key(tenant, "events", job_id)
        behind = "(" + require_event_id(after) if after else None
        with translated():
            if newest_first:
                entries = await self._client.xrevrange(stream, max=behind or "+", count=limit)
            else:
                entries = await self._client.xrange(stream, min=behind or "-", count=limit)
        return _events(cast("list[Entry]", entries))

    async def wait_events(
        self, tenant: str, job_id: str, after: str | None, timeout_seconds: float
    ) -> list[JobEvent]:
        """Return the events behind `after`, oldest first, waiting for the first if none."""
        cursor = require_event_id(after) if after else "0-0"
        stream = self._key(tenant, "events", job_id)
        return _events(await self._reader.read(stream, cursor, timeout_seconds))

    async def list(
        self, tenant: str, kind: JobKind, *, after: str | None = None, limit: int = 20
    ) -> list[Job]:
        """Return up to `limit` jobs, newest first, beginning behind the job `after`."""
        _, page = await self._run("list", tenant, kind, after or "", limit)
        return [
            decode_job(tenant, job_id, fields)
            for job_id, fields in zip(page[::2], page[1::2], strict=True)
        ]

    async def ping(self) -> None:
        """Return if the server answers; raise `Unavailable` otherwise."""
        with translated():
            await self._client.ping()

    async def close(self) -> None:
        """Release connections."""
        await self._client.aclose()

    async def unarchived(self, limit: int = 100) -> builtins.list[Job]:
        """Return ended jobs that nobody has marked as archived, oldest first."""
        _, page = await self._run("unarchived", limit)
        return [decode_job(*page[n : n + 3]) for n in range(0, len(page), 3)]

    def _key(self, tenant: str, name: str, rest: str) -> str:
        return f"{self._root}:t:{tenant}:{name}:{rest}"

    async def _run(self, script: str, *args: str | float) -> Sequence[Any]:
        with translated():
            reply = await self._scripts[script](keys=[self._root], args=args)
        return cast(Sequence[Any], reply)


def _events(entries: Iterable[Entry]) -> list[JobEvent]:
    return [decode_event(event_id, fields) for event_id, fields in entries]


def _estimate(text: str) -> Estimate | None:
    return Estimate.model_validate_json(text) if text else None


def _progress(text: str) -> Progress | None:
    return Progress.model_validate_json(text) if text else None


def _ratio(sums: str) -> float:
    took, expected = map(float, sums.split())
    return took / expected
