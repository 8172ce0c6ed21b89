"""The job queue of one process and one event loop, for unit tests; nothing outlives the object.

It keeps the promises of `JobQueue` by plain means, linear scans included. Leases, delays and
retention follow the injected clock; `wait` and `wait_events` sleep in real time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from core.errors import LeaseLost, NotFound, Overloaded
from core.jobs import Failure, Job, JobEvent, JobKind, JobStatus, Json, NewJob, Once, StopReason
from core.outlook import Estimate, Progress
from core.queue.protocol import Claim, JobQueue
from core.queue.records import ending, job_forgotten, key_reused, refused
from tests.twins.entries import Entry, wanted
from tests.twins.ledger import CANCELLED_FILE, STATES, Ledger
from tests.twins.views import MemoryJobViews

if TYPE_CHECKING:
    from core.changes import Change, ChangeFeed

RETRY_AFTER_SECONDS = 10.0


class MemoryJobQueue(MemoryJobViews, JobQueue):
    """The in-memory twin; see `JobQueue` for what each method promises."""

    def __init__(
        self,
        *,
        changes: ChangeFeed | None = None,
        max_queued: int = 10_000,
        max_attempts: int = 3,
        retention_seconds: float = 86_400,
        max_running: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`changes` receives what `announce` tells."""
        self._changes = changes
        self._max_queued = max_queued
        self._max_attempts = max_attempts
        self._max_running = max_running
        super().__init__(Ledger(clock, retention_seconds))
        self._wakes_seen = dict.fromkeys(JobKind, 0)

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

    async def note_estimate(self, tenant: str, job_id: str, estimate: Estimate) -> None:
        """Note what is expected of a job; for one that is unknown or has ended, do nothing."""
        entry = self._ledger.find(tenant, job_id)
        if entry is not None and not entry.job.status.is_terminal:
            entry.update(estimate=estimate)

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
        entry = ledger.take_next(kind, self._max_running)
        if entry is None:
            self._wakes_seen[kind] = ledger.wakes[kind]
            return None
        now, attempt = ledger.clock(), entry.job.attempt + 1
        entry.lease_ends = now + lease_seconds
        entry.update(
            status=JobStatus.RUNNING, attempt=attempt, worker=worker, claimed_at=now,
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
        self,
        claim: Claim,
        lease_seconds: float,
        progress: Progress | None = None,
        ran_seconds: float | None = None,
    ) -> StopReason | None:
        """Renew the lease; return what was requested, if anything."""
        entry = self._held(claim)
        entry.lease_ends = self._ledger.clock() + lease_seconds
        if progress:
            entry.update(progress=progress)
        if ran_seconds is not None:
            entry.update(ran_seconds=round(ran_seconds, 3))
        return wanted(entry.job)

    async def mark_publishing(self, claim: Claim, lease_seconds: float) -> StopReason | None:
        """Renew the lease and mark the job, or return what was requested and leave it."""
        entry = self._held(claim)
        entry.lease_ends = self._ledger.clock() + lease_seconds
        instead = wanted(entry.job)
        if instead is None:
            entry.update(publishing=True)
        return instead

    async def clear_publishing(self, claim: Claim) -> Job:
        """Take back the mark, because the job has not published; what was put off counts now."""
        entry = self._held(claim)
        entry.update(publishing=False)
        want = wanted(entry.job)
        if want is StopReason.CANCEL:
            self._ledger.finish(entry, JobStatus.CANCELLED)
        elif entry.last_failure:
            self._ledger.finish(entry, JobStatus.FAILED, error=entry.last_failure)
        elif want is StopReason.PAUSE:
            self._ledger.park(entry)
        self._ring()
        return entry.job

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
        entry = self._held(claim)
        event = self._ledger.add_event(entry, type, message, level, data)
        if type in STATES and isinstance(step := event.data.get("step"), int):
            entry.step = step
        self._ring()
        return event

    async def announce(self, claim: Claim, change: Change, result: Json) -> None:
        """Tell the change feed that the queue was given, and note what the job has published."""
        self._held(claim).update(result=result)
        if self._changes:
            await self._changes.publish(change)

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
        ending(status, result, error)
        entry = self._held(claim)
        if status is JobStatus.SUCCEEDED and seconds is not None:
            self._ledger.learn(entry.job, seconds)
        self._ledger.finish(entry, status, result=result, error=error)
        self._ring()
        return entry.job

    async def retry(self, claim: Claim, delay_seconds: float, failure: Failure) -> Job:
        """Give the job back to run again after a delay, because of `failure`."""
        entry = self._held(claim)
        if self._ledger.comes_back(entry, failure, self._max_attempts):
            reason = failure.message
            self._ledger.add_event(
                entry, "retrying", f"The job starts again: {reason}", "warn",
                {"attempt": claim.attempt, "delay_seconds": delay_seconds, "reason": reason},
            )  # fmt: skip
            if delay_seconds > 0:
                entry.due = self._ledger.clock() + delay_seconds
            else:
                self._ledger.add_pending(entry)
        self._ring()
        return entry.job

    async def release(self, claim: Claim) -> Job:
        """Give the job back at once because the worker stops; this uses up no attempt."""
        entry = self._held(claim)
        if self._ledger.comes_back(entry, None, 0):
            self._ledger.add_event(
                entry, "job_restarted", "The worker was stopped; the job starts again.",
                data={
                    "attempt": claim.attempt, "from_step": entry.step, "reason": "worker_stopped",
                },
            )  # fmt: skip
            self._ledger.add_pending(entry)
        self._ring()
        return entry.job

    async def mark_archived(self, job: Job) -> None:
        """Let a job that ended be forgotten after the retention."""
        entry = self._ledger.find(job.tenant, job.id)
        if entry in self._ledger.unarchived:
            self._ledger.unarchived.remove(entry)
            self._ledger.expire(entry)

    async def cancel(self, tenant: str, job_id: str, *, keep_best: bool = False) -> Job:
        """Cancel a waiting or paused job at once, or ask a running one's worker to stop."""
        entry = self._unfinished(tenant, job_id)
        if keep_best:
            entry.update(keep_best=True)
        if entry.job.status is not JobStatus.RUNNING:
            self._ledger.finish(entry, JobStatus.CANCELLED)
        elif not entry.job.cancel_requested:
            entry.update(cancel_requested=True)
            self._ledger.add_event(entry, "cancel_requested", "The worker was asked to stop.")
        self._ring()
        return entry.job

    async def pause(self, tenant: str, job_id: str) -> Job:
        """Pause a waiting job at once, or ask a running one's worker to; it uses up no attempt."""
        entry = self._unfinished(tenant, job_id)
        job = entry.job
        if job.cancel_requested:
            raise refused(job.status, "cancelling")
        if job.publishing or job.result is not None:
            raise refused(job.status, "publishing")
        if job.status is JobStatus.RUNNING:
            if not job.pause_requested:
                entry.update(pause_requested=True)
                self._ledger.add_event(entry, "pause_requested", "The worker was asked to pause.")
        elif job.status is not JobStatus.PAUSED:
            self._ledger.park(entry)
        self._ring()
        return entry.job

    async def resume(self, tenant: str, job_id: str) -> Job:
        """Put a paused job back into its old place in the line."""
        entry = self._ledger.find(tenant, job_id)
        if entry is None:
            raise NotFound(f"There is no job {job_id}.")
        if entry.job.status is not JobStatus.PAUSED:
            raise refused(entry.job.status, "pausing" if entry.job.pause_requested else "")
        self._ledger.add_event(entry, "resumed", "The job goes on.")
        if entry.waits_for:
            entry.update(status=JobStatus.VALIDATING_FILES)
        else:
            self._ledger.add_pending(entry)
        self._ring()
        return entry.job

    def _unfinished(self, tenant: str, job_id: str) -> Entry:
        entry = self._ledger.find(tenant, job_id)
        if entry is None:
            raise NotFound(f"There is no job {job_id}.")
        if entry.job.status.is_terminal:
            raise refused(entry.job.status)
        return entry

    def _held(self, claim: Claim) -> Entry:
        entry = self._ledger.find(claim.job.tenant, claim.job.id)
        current = (JobStatus.RUNNING, claim.attempt, claim.worker)
        if entry is None or (entry.job.status, entry.job.attempt, entry.job.worker) != current:
            raise LeaseLost(f"Attempt {claim.attempt} of job {claim.job.id} is no longer current.")
        return entry
