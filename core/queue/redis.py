"""The job queue on Redis or Valkey: short Lua scripts over plain data structures, JSON only.

Every change of a job is one script, so it happens whole or not at all, and every lease is measured
by the server's clock. Every key begins with `<prefix>:{graft}`, the *root*: the hash tag puts all
of them into one Cluster slot, which is why a script may build the names of the jobs it touches.

    t:<tenant>:job:<id>        hash: the fields of a job, `seq` (its place), `waiting` (a count),
                               `losses` (attempts that ended badly; enough of them fail the job),
                               `last_failure` (why it fails, should it not have published),
                               `step` (that of its newest checkpoint)
    t:<tenant>:events:<id>     stream: its events
    t:<tenant>:waiters:<id>    set: ids of the jobs that wait for it
    t:<tenant>:pending:<kind>  sorted set: ids by priority, then age
    t:<tenant>:open:<kind>     set: ids of the unfinished jobs, paused ones included
    t:<tenant>:running:<kind>  set: ids of the running jobs
    t:<tenant>:jobs:<kind>     sorted set: ids by age, for `list`
    t:<tenant>:seq:<kind>      counter that numbers the jobs
    t:<tenant>:once:<name>     hash: a request that may be repeated, and the job it made; expires
    tenants:<kind>             sorted set: the tenants with pending jobs, by whose turn it is
    delayed:<kind>             sorted set: `<tenant>/<id>` by the time it is due, ms
    leases:<kind>              sorted set: `<tenant>/<id>` by the time the lease runs out, ms
    speeds:<kind>              hash: by pace, how long jobs took of late and were expected to, s
    wake:<kind>                stream of one entry: something became pending
    unarchived                 sorted set: `<tenant>/<id>` of the ended fine_tune jobs, and of the
                               failed ingest jobs, that are not known to be in the artifact store,
                               by the time they ended, s
    changes                    stream: the change feed (core.changes)
    presence, acks             who lives, and who serves what (core.presence)

A finished job's hash and events expire after the retention, which begins when it leaves
`unarchived` or, if it was never there, when it ends; its id leaves `jobs` on a later call.
Not here: the rules of each step, which are in `lua/`, each file with its arguments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from core.changes import FEED_LENGTH, Change
from core.errors import LeaseLost, NotFound, Overloaded
from core.jobs import Failure, Job, JobEvent, JobKind, JobStatus, Json, NewJob, Once, StopReason
from core.outlook import Estimate, Progress
from core.queue.protocol import Claim, JobQueue
from core.queue.records import (
    decode_event,
    decode_job,
    encode,
    ending,
    job_forgotten,
    key_reused,
    refused,
)
from core.queue.redis_views import RedisJobViews

RETRY_AFTER_SECONDS = 10.0


class RedisJobQueue(RedisJobViews, JobQueue):
    """The queue that all processes share; see `JobQueue` for what each method promises."""

    def __init__(
        self,
        client: Redis,
        *,
        prefix: str,
        max_queued: int,
        max_attempts: int,
        retention_seconds: int,
        max_running: int = 0,
    ) -> None:
        """`client` decodes its responses, as that of `core.queue.connection.connect` does.

        `max_running` is of a tenant's jobs of one kind; 0 means any number.
        """
        super().__init__(client, prefix=prefix)
        self._max_queued = max_queued
        self._max_attempts = max_attempts
        self._max_running = max_running
        self._retention_seconds = retention_seconds
        self._wake_cursors: dict[JobKind, str] = {}

    async def enqueue(self, new: NewJob) -> Job:
        """Add a job and wake a worker; with an id that exists, return that job unchanged."""
        word, *answer = await self._run(
            "enqueue",
            new.tenant, new.id, new.kind, encode(new.spec), new.priority,
            self._max_queued, self._retention_seconds,
            _once(new.once) if new.once else "",
            new.estimate.model_dump_json() if new.estimate else "",
            *dict.fromkeys(new.after),
        )  # fmt: skip
        if word == "missing":
            raise NotFound(f"There is no job {answer[0]} to wait for.", param="after")
        if word == "full":
            raise Overloaded(
                f"There are already {self._max_queued} unfinished jobs of this kind.",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        return _recalled(new.tenant, word, *answer)

    async def note_estimate(self, tenant: str, job_id: str, estimate: Estimate) -> None:
        """Note what is expected of a job; for one that is unknown or has ended, do nothing."""
        await self._run("note_estimate", tenant, job_id, estimate.model_dump_json())

    async def recall(self, tenant: str, once: Once) -> Job | None:
        """Return the job that an earlier request made and this one repeats; None if it is new."""
        word, *answer = await self._run("recall", tenant, _once(once))
        return None if word == "none" else _recalled(tenant, word, *answer)

    async def claim(self, kind: JobKind, worker: str, lease_seconds: float) -> Claim | None:
        """Lease the next job of `kind`, or return None when none is due."""
        word, *answer = await self._run(
            "claim", kind, worker, _ms(lease_seconds), self._max_attempts,
            self._retention_seconds, self._max_running,
        )  # fmt: skip
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
        self,
        claim: Claim,
        lease_seconds: float,
        progress: Progress | None = None,
        ran_seconds: float | None = None,
    ) -> StopReason | None:
        """Renew the lease; return what was requested, if anything."""
        text = progress.model_dump_json() if progress else ""
        ran = "" if ran_seconds is None else f"{ran_seconds:.3f}"
        answer = await self._run_fenced("heartbeat", claim, _ms(lease_seconds), text, ran)
        return StopReason(answer[0]) if answer[0] else None

    async def mark_publishing(self, claim: Claim, lease_seconds: float) -> StopReason | None:
        """Renew the lease and mark the job, or return what was requested and leave it."""
        answer = await self._run_fenced("mark_publishing", claim, _ms(lease_seconds))
        return StopReason(answer[0]) if answer[0] else None

    async def clear_publishing(self, claim: Claim) -> Job:
        """Take back the mark, because the job has not published; what was put off counts now."""
        answer = await self._run_fenced("clear_publishing", claim, self._retention_seconds)
        return decode_job(claim.job.tenant, claim.job.id, answer[0])

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

    async def announce(self, claim: Claim, change: Change, result: Json) -> None:
        """Tell every service process of a change, and note what the job has published."""
        await self._run_fenced(
            "announce", claim, change.model_dump_json(), FEED_LENGTH, encode(result)
        )

    async def settle(
        self,
        claim: Claim,
        status: JobStatus,
        *,
        result: Json | None = None,
        error: Failure | None = None,
        seconds: float | None = None,
    ) -> Job:
        """End the job with a terminal status, once, with an event, and free what waits for it."""
        answer = await self._run_fenced(
            "settle", claim, *ending(status, result, error), self._retention_seconds,
            "" if seconds is None else seconds,
        )  # fmt: skip
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

    async def mark_archived(self, job: Job) -> None:
        """Let a job that ended be forgotten after the retention."""
        await self._run("mark_archived", job.tenant, job.id, self._retention_seconds)

    async def cancel(self, tenant: str, job_id: str, *, keep_best: bool = False) -> Job:
        """Cancel a waiting or paused job at once, or ask a running one's worker to stop."""
        return await self._ask("cancel", tenant, job_id, self._retention_seconds, int(keep_best))

    async def pause(self, tenant: str, job_id: str) -> Job:
        """Pause a waiting job at once, or ask a running one's worker to; it uses up no attempt."""
        return await self._ask("pause", tenant, job_id)

    async def resume(self, tenant: str, job_id: str) -> Job:
        """Put a paused job back into its old place in the line."""
        return await self._ask("resume", tenant, job_id)

    async def _ask(self, script: str, tenant: str, job_id: str, *args: int) -> Job:
        word, *answer = await self._run(script, tenant, job_id, *args)
        if word == "missing":
            raise NotFound(f"There is no job {job_id}.")
        if word == "refused":
            raise refused(*answer)
        return decode_job(tenant, job_id, answer[0])

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
