"""The job queue of one process and one event loop, for unit tests; nothing outlives the object.

It keeps the promises of `JobQueue` by plain means, linear scans included. Leases, delays and
retention follow the injected clock; `wait` and `wait_events` sleep in real time.
"""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from core.errors import Conflict, LeaseLost, NotFound, Overloaded
from core.jobs import (
    Failure,
    Job,
    JobEvent,
    JobKind,
    JobStatus,
    Json,
    NewJob,
    Once,
    Progress,
    event_order,
)
from core.queue.ledger import CANCELLED_FILE, Entry, Ledger
from core.queue.protocol import Claim, JobQueue
from core.queue.records import ending, job_forgotten, key_reused, require_event_id

if TYPE_CHECKING:
    from core.changes import Change, ChangeFeed

RETRY_AFTER_SECONDS = 10.0


class MemoryJobQueue(JobQueue):
    """The in-memory twin; see `JobQueue` for what each method promises."""

    def __init__(
        self,
        *,
        changes: ChangeFeed | None = None,
        max_queued: int = 10_000,
        max_attempts: int = 3,
        retention_seconds: float = 86_400,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`changes` receives what `announce` tells."""
        self._changes = changes
        self._max_queued = max_queued
        self._max_attempts = max_attempts
        self._ledger = Ledger(clock, retention_seconds)
        self._wakes_seen = dict.fromkeys(JobKind, 0)
        self._changed = asyncio.Event()

    async def enqueue(self, new: NewJob) -> Job:
        """Add a job and wake a worker; with an id that exists, return that job unchanged."""
        if existing := self._ledger.find(new.tenant, new.id):
            return existing.job
        if new.once and (repeated := await self.recall(new.tenant, new.once)):
            return repeated
        awaited: list[Job] = []
        for name in new.after:
            first = self._ledger.find(new.tenant, name)
            if first is None:
                raise NotFound(f"There is no job {name} to wait for.", param="after")
            awaited.append(first.job)
        jobs = [entry.job for entry in self._ledger.of(new.kind, new.tenant)]
        if sum(not job.status.is_terminal for job in jobs) >= self._max_queued:
            raise Overloaded(
                f"There are already {self._max_queued} unfinished jobs of this kind.",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        entry = self._ledger.add(new)
        unmet = [job for job in awaited if job.status in (JobStatus.FAILED, JobStatus.CANCELLED)]
        entry.waits_for = {job.id for job in awaited if not job.status.is_terminal}
        if unmet:
            error = unmet[0].error or CANCELLED_FILE
            self._ledger.finish(entry, JobStatus.FAILED, error=error)
        elif not entry.waits_for:
            self._ledger.admit(entry, waited=bool(awaited))
        self._ring()
        return entry.job

    async def recall(self, tenant: str, once: Once) -> Job | None:
        """Return the job that an earlier request made and this one repeats; None if it is new."""
        request = self._ledger.first(tenant, once)
        if request is None:
            return None
        if request.digest != once.digest:
            raise key_reused()
        entry = self._ledger.find(tenant, request.job_id)
        if entry is None:
            raise job_forgotten(request.job_id)
        return entry.job

    async def claim(self, kind: JobKind, worker: str, lease_seconds: float) -> Claim | None:
        """Lease the next job of `kind`, or return None when none is due."""
        ledger = self._ledger
        ledger.take_back(kind, self._max_attempts)
        self._ring()
        if not ledger.turns[kind]:
            self._wakes_seen[kind] = ledger.wakes[kind]
            return None
        tenant = ledger.turns[kind].pop(0)
        entry, *others = ledger.pending(kind, tenant)
        if others:
            ledger.turns[kind].append(tenant)
        now, attempt = ledger.clock(), entry.job.attempt + 1
        entry.lease_ends = now + lease_seconds
        entry.update(
            status=JobStatus.RUNNING, attempt=attempt, worker=worker,
            started_at=entry.job.started_at or now,
        )  # fmt: skip
        ledger.add_event(
            entry, "started", f"A worker started attempt {attempt}.",
            data={"attempt": attempt, "worker": worker},
        )  # fmt: skip
        return Claim(entry.job, worker)

    async def wait(self, kind: JobKind, timeout_seconds: float) -> None:
        """Return when a job of `kind` may have become claimable, or after the timeout."""
        ledger = self._ledger
        deadline = time.monotonic() + timeout_seconds
        while ledger.wakes[kind] == self._wakes_seen[kind]:
            moments = [m for e in ledger.of(kind) for m in (e.due, e.lease_ends) if m is not None]
            due = min(moments, default=float("inf")) - ledger.clock()
            remaining = deadline - time.monotonic()
            if due <= 0 or remaining <= 0:
                return
            await self._change(min(due, remaining))
        self._wakes_seen[kind] = ledger.wakes[kind]

    async def heartbeat(
        self, claim: Claim, lease_seconds: float, progress: Progress | None = None
    ) -> bool:
        """Renew the lease; return True when a cancel was requested."""
        entry = self._held(claim)
        entry.lease_ends = self._ledger.clock() + lease_seconds
        if progress:
            entry.update(progress=progress)
        return entry.job.cancel_requested

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
        event = self._ledger.add_event(self._held(claim), type, message, level, data)
        self._ring()
        return event

    async def announce(self, claim: Claim, change: Change) -> None:
        """Tell the change feed that the queue was given."""
        self._held(claim)
        if self._changes:
            await self._changes.publish(change)

    async def settle(
        self,
        claim: Claim,
        status: JobStatus,
        *,
        result: Json | None = None,
        error: Failure | None = None,
    ) -> Job:
        """End the job with a terminal status, once, with an event, and free what waits for it."""
        ending(status, result, error)
        entry = self._held(claim)
        self._ledger.finish(entry, status, result=result, error=error)
        self._ring()
        return entry.job

    async def retry(self, claim: Claim, delay_seconds: float, failure: Failure) -> Job:
        """Give the job back to run again after a delay, because of `failure`."""
        entry = self._held(claim)
        entry.losses += 1
        if entry.job.cancel_requested:
            self._ledger.finish(entry, JobStatus.CANCELLED)
        elif entry.losses >= self._max_attempts:
            self._ledger.finish(entry, JobStatus.FAILED, error=failure)
        else:
            reason = failure.message
            self._ledger.add_event(
                entry, "retrying", f"The job starts again: {reason}", "warn",
                {"attempt": claim.attempt, "delay_seconds": delay_seconds, "reason": reason},
            )  # fmt: skip
            if delay_seconds > 0:
                entry.update(status=JobStatus.QUEUED, worker=None, progress=None)
                entry.lease_ends, entry.due = None, self._ledger.clock() + delay_seconds
            else:
                self._ledger.add_pending(entry)
        self._ring()
        return entry.job

    async def release(self, claim: Claim) -> Job:
        """Give the job back at once because the worker stops; this uses up no attempt."""
        entry = self._held(claim)
        if entry.job.cancel_requested:
            self._ledger.finish(entry, JobStatus.CANCELLED)
        else:
            self._ledger.add_event(
                entry, "job_restarted", "The worker was stopped; the job starts again.",
                data={"attempt": claim.attempt, "reason": "worker_stopped"},
            )  # fmt: skip
            self._ledger.add_pending(entry)
        self._ring()
        return entry.job

    async def unarchived(self, limit: int = 100) -> builtins.list[Job]:
        """Return ended `fine_tune` jobs that nobody has marked as archived, oldest first."""
        return [entry.job for entry in self._ledger.unarchived[:limit]]

    async def mark_archived(self, job: Job) -> None:
        """Let a job that ended be forgotten after the retention."""
        entry = self._ledger.find(job.tenant, job.id)
        if entry in self._ledger.unarchived:
            self._ledger.unarchived.remove(entry)
            self._ledger.expire(entry)

    async def cancel(self, tenant: str, job_id: str) -> Job:
        """Cancel a waiting job at once, or ask a running one's worker to stop."""
        entry = self._ledger.find(tenant, job_id)
        if entry is None:
            raise NotFound(f"There is no job {job_id}.")
        if entry.job.status.is_terminal:
            raise Conflict(f"The job is already {entry.job.status}.")
        if entry.job.status is not JobStatus.RUNNING:
            self._ledger.finish(entry, JobStatus.CANCELLED)
        elif not entry.job.cancel_requested:
            entry.update(cancel_requested=True)
            self._ledger.add_event(entry, "cancel_requested", "The worker was asked to stop.")
        self._ring()
        return entry.job

    async def get(self, tenant: str, job_id: str) -> Job | None:
        """Return the job, or None."""
        entry = self._ledger.find(tenant, job_id)
        return entry.job if entry else None

    async def position(self, job: Job) -> int | None:
        """How many jobs of the tenant and kind go before this queued one; None if not queued."""
        ids = [entry.job.id for entry in self._ledger.pending(job.kind, job.tenant)]
        return ids.index(job.id) if job.id in ids else None

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
        entry = self._ledger.find(tenant, job_id)
        events = list(entry.events) if entry else []
        if newest_first:
            events.reverse()
        if after:
            cursor = event_order(require_event_id(after))
            events = [
                event
                for event in events
                if event_order(event.id) != cursor
                and (event_order(event.id) < cursor) == newest_first
            ]
        return events[:limit]

    async def wait_events(
        self, tenant: str, job_id: str, after: str | None, timeout_seconds: float
    ) -> list[JobEvent]:
        """Return the events behind `after`, oldest first, waiting for the first if none."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            events = await self.events(tenant, job_id, after=after, limit=10_000)
            remaining = deadline - time.monotonic()
            if events or remaining <= 0:
                return events
            await self._change(remaining)

    async def list(
        self, tenant: str, kind: JobKind, *, after: str | None = None, limit: int = 20
    ) -> list[Job]:
        """Return up to `limit` jobs, newest first, beginning behind the job `after`."""
        jobs = [entry.job for entry in reversed(self._ledger.of(kind, tenant))]
        if after:
            ids = [job.id for job in jobs]
            jobs = jobs[ids.index(after) + 1 :] if after in ids else []
        return jobs[:limit]

    async def ping(self) -> None:
        """Return: memory always answers."""

    async def close(self) -> None:
        """Return: there is nothing to release."""

    def _held(self, claim: Claim) -> Entry:
        entry = self._ledger.find(claim.job.tenant, claim.job.id)
        current = (JobStatus.RUNNING, claim.attempt, claim.worker)
        if entry is None or (entry.job.status, entry.job.attempt, entry.job.worker) != current:
            raise LeaseLost(f"Attempt {claim.attempt} of job {claim.job.id} is no longer current.")
        return entry

    def _ring(self) -> None:
        """Let every `_change` return; each looks for itself whether it was meant."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self, timeout_seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
