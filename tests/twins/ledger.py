"""The jobs of a `MemoryJobQueue`, and the steps that a job takes from status to status.

All of it is synchronous and belongs to one event loop. It shares no code with the Lua scripts, so
that the contract suite compares two independent answers. Not here: who may take a step, and
waiting (tests.twins.memory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core.jobs import (
    Failure,
    Job,
    JobEvent,
    JobKind,
    JobStatus,
    Json,
    NewJob,
    Once,
    StopReason,
    event_order,
)
from tests.twins.entries import Entry, Request, wanted

CANCELLED_FILE = Failure(
    code="data_error", message="The validation of the job's file was cancelled."
)
ENDINGS = {
    JobStatus.SUCCEEDED: "The job succeeded.",
    JobStatus.CANCELLED: "The job was cancelled.",
}
PUBLISHING_LOSSES = 20
STATES = frozenset({"checkpoint", "epoch_ended", "state_saved"})
"""Events that tell of a state to go on from."""
WEIGHT_OF_OLDER = 0.8


class Ledger:
    """Every job by (tenant, id), oldest first, and the tenants in the order of their turns."""

    def __init__(self, clock: Callable[[], float], retention_seconds: float) -> None:
        self.clock = clock
        self.entries: dict[tuple[str, str], Entry] = {}
        self.turns: dict[JobKind, list[str]] = {kind: [] for kind in JobKind}
        self.unarchived: list[Entry] = []
        self.wakes = dict.fromkeys(JobKind, 0)
        self.requests: dict[tuple[str, str], Request] = {}
        self.speeds: dict[JobKind, dict[str, tuple[float, float]]] = {kind: {} for kind in JobKind}
        self._retention_seconds = retention_seconds
        self._seq = 0

    def find(self, tenant: str, job_id: str) -> Entry | None:
        """Return the job's entry, unless its retention is over."""
        entry = self.entries.get((tenant, job_id))
        if entry and entry.expires is not None and entry.expires <= self.clock():
            del self.entries[tenant, job_id]
            return None
        return entry

    def of(self, kind: JobKind, tenant: str | None = None) -> list[Entry]:
        """Return the entries of a kind, oldest first."""
        return [
            entry
            for key, entry in list(self.entries.items())
            if entry.job.kind == kind and tenant in (None, key[0]) and self.find(*key)
        ]

    def pending(self, kind: JobKind, tenant: str) -> list[Entry]:
        """Return the entries that a worker may have now: higher priority first, then older."""
        queued = [
            entry
            for entry in self.of(kind, tenant)
            if entry.job.status is JobStatus.QUEUED and entry.due is None
        ]
        return sorted(queued, key=lambda entry: (-entry.job.priority, entry.seq))

    def running(self, kind: JobKind, tenant: str) -> int:
        """Return how many of a tenant's jobs of a kind run."""
        return sum(e.job.status is JobStatus.RUNNING for e in self.of(kind, tenant))

    def take_next(self, kind: JobKind, max_running: int) -> Entry | None:
        """Take the next job out of the line; a tenant at its cap passes its turn."""
        turns, passed = self.turns[kind], set()
        while turns and turns[0] not in passed:
            tenant = turns.pop(0)
            if 0 < max_running <= self.running(kind, tenant):
                passed.add(tenant)
                turns.append(tenant)
                continue
            entry, *others = self.pending(kind, tenant)
            if others:
                turns.append(tenant)
            return entry
        return None

    def add(self, new: NewJob) -> Entry:
        """Add a job in `validating_files`."""
        self._seq += 1
        job = Job(
            **new.model_dump(exclude={"after", "once"}),
            status=JobStatus.VALIDATING_FILES,
            created_at=self.clock(),
        )
        self.entries[new.tenant, new.id] = entry = Entry(job, self._seq)
        if new.once:
            now = self.clock()
            self.requests[new.tenant, new.once.name] = Request(
                job_id=new.id,
                digest=new.once.digest,
                until=now + new.once.seconds,
                repeated_at=now if new.once.is_repeat else None,
            )
        return entry

    def first(self, tenant: str, once: Once) -> Request | None:
        """Return the request that this one repeats, or that has the same name, if any."""
        request, now = self.requests.get((tenant, once.name)), self.clock()
        if request is None or request.until <= now:
            return None
        if once.is_repeat or request.digest != once.digest:
            return request
        arrived = now - once.age_seconds
        overtook = request.repeated_at is not None and request.repeated_at >= arrived
        return request if overtook else None

    def add_event(
        self, entry: Entry, type: str, message: str, level: str = "info", data: Json | None = None
    ) -> JobEvent:
        """Append to a job's history."""
        order = (int(self.clock() * 1000), 0)
        if entry.events and order <= (last := event_order(entry.events[-1].id)):
            order = (last[0], last[1] + 1)
        fields: dict[str, Any] = {"type": type, "message": message, "level": level}
        event = JobEvent(
            id=f"{order[0]}-{order[1]}", created_at=order[0] / 1000, data=data or {}, **fields
        )
        entry.events.append(event)
        return event

    def admit(self, entry: Entry, *, waited: bool) -> None:
        """Let a job out of `validating_files`; a paused one stays paused."""
        if waited:
            self.add_event(entry, "validated", "The files of the job are ready.")
        if entry.job.status is JobStatus.PAUSED:
            return
        self.add_event(entry, "queued", "The job waits for a worker.")
        self.add_pending(entry)

    def add_pending(self, entry: Entry) -> None:
        """Put a job into its tenant's line; a tenant that comes back goes behind the others."""
        entry.update(status=JobStatus.QUEUED, worker=None, progress=None)
        entry.due = entry.lease_ends = None
        turns = self.turns[entry.job.kind]
        if entry.job.tenant not in turns:
            turns.append(entry.job.tenant)
        self.wakes[entry.job.kind] += 1

    def finish(
        self,
        entry: Entry,
        status: JobStatus,
        *,
        result: Json | None = None,
        error: Failure | None = None,
    ) -> None:
        """End a job, and free or fail what waits for it."""
        entry.update(
            status=status, finished_at=self.clock(), result=result or entry.job.result,
            error=error, progress=None, publishing=False, pause_requested=False,
        )  # fmt: skip
        entry.due = entry.lease_ends = None
        job = entry.job
        if job.kind is JobKind.FINE_TUNE or status is JobStatus.FAILED:
            self.unarchived.append(entry)
        else:
            self.expire(entry)
        self._leave_line(entry)
        if error:
            self.add_event(entry, "failed", error.message, "error", {"code": error.code})
        else:
            self.add_event(entry, status, ENDINGS[status])
        for waiter in list(self.entries.values()):
            is_over = waiter.job.status.is_terminal
            if is_over or waiter.job.tenant != job.tenant or job.id not in waiter.waits_for:
                continue
            waiter.waits_for.remove(job.id)
            if status is not JobStatus.SUCCEEDED:
                self.finish(waiter, JobStatus.FAILED, error=error or CANCELLED_FILE)
            elif not waiter.waits_for:
                self.admit(waiter, waited=True)

    def _leave_line(self, entry: Entry) -> None:
        job = entry.job
        turns = self.turns[job.kind]
        if job.tenant in turns and not self.pending(job.kind, job.tenant):
            turns.remove(job.tenant)
        self.wakes[job.kind] += 1  # a cap may have held back another of the tenant's

    def learn(self, job: Job, seconds: float) -> None:
        """Add what a job took, and what it was expected to, to the sums of its pace."""
        if job.estimate is None or job.attempt != 1 or job.estimate.seconds <= 0:
            return
        speeds, pace = self.speeds[job.kind], job.estimate.pace
        took, expected = speeds.get(pace, (0.0, 0.0))
        speeds[pace] = (
            WEIGHT_OF_OLDER * took + seconds,
            WEIGHT_OF_OLDER * expected + job.estimate.seconds,
        )

    def park(self, entry: Entry) -> None:
        """Put a job aside until it is resumed or cancelled."""
        entry.update(status=JobStatus.PAUSED, worker=None, progress=None, pause_requested=False)
        entry.due = entry.lease_ends = None
        self._leave_line(entry)
        self.add_event(entry, "paused", "The job is paused.")

    def comes_back(self, entry: Entry, failure: Failure | None, max_attempts: int) -> bool:
        """Give a running job what it is due, now that no worker has it; True if it runs again.

        `failure` is given when an attempt is used up. What was published is told first; what may
        have been, by another attempt.
        """
        job = entry.job
        entry.losses += failure is not None
        limit = max_attempts + (PUBLISHING_LOSSES if job.publishing else 0)
        want = wanted(job)
        if job.result is not None:
            self.finish(entry, JobStatus.SUCCEEDED, result=job.result)
        elif want is StopReason.CANCEL:
            self.finish(entry, JobStatus.CANCELLED)
        elif failure and entry.losses >= limit:
            self.finish(entry, JobStatus.FAILED, error=failure)
        elif want is StopReason.PAUSE:
            self.park(entry)
        else:
            if job.publishing and failure and entry.losses >= max_attempts:
                entry.last_failure = failure
            entry.update(status=JobStatus.QUEUED, worker=None, progress=None)
            entry.lease_ends = None
            self.wakes[job.kind] += 1
            return True
        return False

    def expire(self, entry: Entry) -> None:
        """Let a job that ended be forgotten after the retention."""
        entry.expires = self.clock() + self._retention_seconds

    def take_back(self, kind: JobKind, max_attempts: int) -> None:
        """Take jobs from workers whose lease ran out, and end delays that are over."""
        now = self.clock()
        leased = [e for e in self.of(kind) if e.lease_ends is not None and e.lease_ends <= now]
        for entry in sorted(leased, key=lambda e: (e.lease_ends, e.job.tenant, e.job.id)):
            attempt = entry.job.attempt
            message = f"The worker was lost in each of {entry.losses + 1} attempts."
            failure = Failure(code="worker_lost", message=message)
            if self.comes_back(entry, failure, max_attempts):
                self.add_event(
                    entry, "job_restarted", "The worker was lost; the job starts again.", "warn",
                    {"attempt": attempt, "from_step": entry.step, "reason": "worker_lost"},
                )  # fmt: skip
                self.add_pending(entry)
        delayed = [e for e in self.of(kind) if e.due is not None and e.due <= now]
        for entry in sorted(delayed, key=lambda e: (e.due, e.job.tenant, e.job.id)):
            self.add_pending(entry)
