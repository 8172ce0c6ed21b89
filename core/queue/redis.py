"""The job queue on Redis or Valkey: short Lua scripts over plain data structures, JSON only.

Every change of a job is one script, so it happens whole or not at all, and every lease is measured
by the server's clock. Every key begins with `<prefix>:{graft}`, the *root*: the hash tag puts all
of them into one Cluster slot, which is why a script may build the names of the jobs it touches.

    t:<tenant>:job:<id>        hash: the fields of a job, `seq` (its place), `waiting` (a count),
                               `losses` (attempts that ended badly; enough of them fail the job)
    t:<tenant>:events:<id>     stream: its events
    t:<tenant>:waiters:<id>    set: ids of the jobs that wait for it
    t:<tenant>:pending:<kind>  sorted set: ids by priority, then age
    t:<tenant>:open:<kind>     set: ids of the unfinished jobs
    t:<tenant>:jobs:<kind>     sorted set: ids by age, for `list`
    t:<tenant>:seq:<kind>      counter that numbers the jobs
    t:<tenant>:once:<name>     hash: a request that may be repeated, and the job it made; expires
    tenants:<kind>             sorted set: the tenants with pending jobs, by whose turn it is
    delayed:<kind>             sorted set: `<tenant>/<id>` by the time it is due, ms
    leases:<kind>              sorted set: `<tenant>/<id>` by the time the lease runs out, ms
    wake:<kind>                stream of one entry: something became pending
    unarchived                 sorted set: `<tenant>/<id>` of the ended fine_tune jobs that are not
                               known to be in the artifact store, by the time they ended, s
    changes                    stream: the change feed (core.changes)

A finished job's hash and events expire after the retention, which begins when it leaves
`unarchived` or, for other kinds, when it ends; its id leaves `jobs` on a later call.
Not here: the rules of each step, which are in `lua/`, each file with its arguments.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, cast

from redis.asyncio import Redis

from core.changes import FEED_LENGTH, Change
from core.errors import Conflict, LeaseLost, NotFound, Overloaded
from core.jobs import Failure, Job, JobEvent, JobKind, JobStatus, Json, NewJob, Once, Progress
from core.queue.connection import Entry, StreamReader, translated
from core.queue.protocol import Claim, JobQueue
from core.queue.records import (
    decode_event,
    decode_job,
    encode,
    ending,
    job_forgotten,
    key_reused,
    require_event_id,
)

RETRY_AFTER_SECONDS = 10.0

_SCRIPTS = (
    "announce", "append_event", "cancel", "claim", "due", "enqueue", "heartbeat", "list",
    "mark_archived", "recall", "release", "retry", "settle", "unarchived",
)  # fmt: skip


class RedisJobQueue(JobQueue):
    """The queue that all processes share; see `JobQueue` for what each method promises."""

    def __init__(
        self,
        client: Redis,
        *,
        prefix: str,
        max_queued: int,
        max_attempts: int,
        retention_seconds: int,
    ) -> None:
        """`client` decodes its responses, as that of `core.queue.connection.connect` does."""
        self._client = client
        self._root = f"{prefix}:{{graft}}"
        self._max_queued = max_queued
        self._max_attempts = max_attempts
        self._retention_seconds = retention_seconds
        self._reader = StreamReader(client)
        self._wake_cursors: dict[JobKind, str] = {}
        folder = files("core.queue").joinpath("lua")
        shared = folder.joinpath("job.lua").read_text("utf-8")
        self._scripts = {
            name: client.register_script(
                shared + "\n" + folder.joinpath(f"{name}.lua").read_text("utf-8")
            )
            for name in _SCRIPTS
        }

    async def enqueue(self, new: NewJob) -> Job:
        """Add a job and wake a worker; with an id that exists, return that job unchanged."""
        word, *answer = await self._run(
            "enqueue",
            new.tenant, new.id, new.kind, encode(new.spec), new.priority,
            self._max_queued, self._retention_seconds,
            _once(new.once) if new.once else "", *dict.fromkeys(new.after),
        )  # fmt: skip
        if word == "missing":
            raise NotFound(f"There is no job {answer[0]} to wait for.", param="after")
        if word == "full":
            raise Overloaded(
                f"There are already {self._max_queued} unfinished jobs of this kind.",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        return _recalled(new.tenant, word, *answer)

    async def recall(self, tenant: str, once: Once) -> Job | None:
        """Return the job that an earlier request made and this one repeats; None if it is new."""
        word, *answer = await self._run("recall", tenant, _once(once))
        return None if word == "none" else _recalled(tenant, word, *answer)

    async def claim(self, kind: JobKind, worker: str, lease_seconds: float) -> Claim | None:
        """Lease the next job of `kind`, or return None when none is due."""
        word, *answer = await self._run(
            "claim", kind, worker, _ms(lease_seconds), self._max_attempts, self._retention_seconds
        )
        if word == "none":
            self._wake_cursors[kind] = answer[0]
            return None
        return Claim(decode_job(*answer), worker)

    async def wait(self, kind: JobKind, timeout_seconds: float) -> None:
        """Return when a job of `kind` may have become claimable, or after the timeout."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while (remaining := deadline - loop.time()) > 0:
            word, *answer = await self._run("due", kind)
            pause = remaining if word == "none" else min(remaining, answer[0] / 1000)
            if pause <= 0:
                return
            cursor = self._wake_cursors.get(kind, "0-0")
            entries = await self._reader.read(f"{self._root}:wake:{kind}", cursor, pause)
            if entries:
                self._wake_cursors[kind] = entries[-1][0]
                return

    async def heartbeat(
        self, claim: Claim, lease_seconds: float, progress: Progress | None = None
    ) -> bool:
        """Renew the lease; return True when a cancel was requested."""
        text = progress.model_dump_json() if progress else ""
        answer = await self._run_fenced("heartbeat", claim, _ms(lease_seconds), text)
        return bool(answer[0] == "1")

    async def append_event(
        self,
        claim: Claim,
        type: str,
        message: str,
        *,
        level: str = "info",
        data: Json | None = None,
    ) -> JobEvent:
        """Append to the job's history."""
        fields = {"type": type, "message": message, "level": level, "data": encode(data or {})}
        decode_event("0-0", fields)  # a level that is none must not reach the stream
        answer = await self._run_fenced(
            "append_event", claim, type, message, level, encode(data) if data else ""
        )
        return decode_event(answer[0], fields)

    async def announce(self, claim: Claim, change: Change) -> None:
        """Tell every service process of a change, through the change feed."""
        await self._run_fenced("announce", claim, change.model_dump_json(), FEED_LENGTH)

    async def settle(
        self,
        claim: Claim,
        status: JobStatus,
        *,
        result: Json | None = None,
        error: Failure | None = None,
    ) -> Job:
        """End the job with a terminal status, once, with an event, and free what waits for it."""
        answer = await self._run_fenced(
            "settle", claim, *ending(status, result, error), self._retention_seconds
        )
        return decode_job(claim.job.tenant, claim.job.id, answer[0])

    async def retry(self, claim: Claim, delay_seconds: float, failure: Failure) -> Job:
        """Give the job back to run again after a delay, because of `failure`."""
        answer = await self._run_fenced(
            "retry", claim, delay_seconds, failure.model_dump_json(),
            self._max_attempts, self._retention_seconds,
        )  # fmt: skip
        return decode_job(claim.job.tenant, claim.job.id, answer[0])

    async def release(self, claim: Claim) -> Job:
        """Give the job back at once because the worker stops; this uses up no attempt."""
        answer = await self._run_fenced("release", claim, self._retention_seconds)
        return decode_job(claim.job.tenant, claim.job.id, answer[0])

    async def unarchived(self, limit: int = 100) -> builtins.list[Job]:
        """Return ended `fine_tune` jobs that nobody has marked as archived, oldest first."""
        _, page = await self._run("unarchived", limit)
        return [decode_job(*page[n : n + 3]) for n in range(0, len(page), 3)]

    async def mark_archived(self, job: Job) -> None:
        """Let a job that ended be forgotten after the retention."""
        await self._run("mark_archived", job.tenant, job.id, self._retention_seconds)

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel a waiting job at once, or ask a running one's worker to stop."""
        word, *answer = await self._run("cancel", tenant, job_id, self._retention_seconds)
        if word == "missing":
            raise NotFound(f"There is no job {job_id}.")
        if word == "terminal":
            raise Conflict(f"The job is already {answer[0]}.")
        return decode_job(tenant, job_id, answer[0])

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

    def _key(self, tenant: str, name: str, rest: str) -> str:
        return f"{self._root}:t:{tenant}:{name}:{rest}"

    async def _run(self, script: str, *args: str | float) -> Sequence[Any]:
        with translated():
            reply = await self._scripts[script](keys=[self._root], args=args)
        return cast(Sequence[Any], reply)

    async def _run_fenced(self, script: str, claim: Claim, *args: str | float) -> Sequence[Any]:
        job = claim.job
        word, *answer = await self._run(
            script, job.tenant, job.id, claim.attempt, claim.worker, *args
        )
        if word == "lost":
            raise LeaseLost(f"Attempt {claim.attempt} of job {job.id} is no longer current.")
        return answer


def _once(once: Once) -> str:
    return once.model_dump_json()


def _recalled(tenant: str, word: str, job_id: str, record: Sequence[str] = ()) -> Job:
    if word == "reused":
        raise key_reused()
    if word == "forgotten":
        raise job_forgotten(job_id)
    return decode_job(tenant, job_id, record)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _events(entries: Iterable[Entry]) -> list[JobEvent]:
    return [decode_event(event_id, fields) for event_id, fields in entries]
