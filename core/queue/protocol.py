"""A lease queue for jobs, as a Protocol: core.queue.redis keeps it, and in unit tests memory does.

A job waits in `pending`. `claim` gives a worker a lease, which it must renew with `heartbeat`; if
the worker dies, the next claim by anyone takes the job back. Every write carries the attempt; a
worker whose lease was taken is refused with `LeaseLost` and must stop without publishing.
Delivery is at least once; settling is once.

Before it publishes, an attempt marks its job as *publishing*. From then on nobody ends the job but
an attempt that knows whether it has published: a cancel only leaves its wish, and lost attempts
bring the job back even if none are left. `announce` is such knowledge, `clear_publishing` too.

A job may name others that must succeed first (`NewJob.after`): until then it is
`validating_files`, and if one of them fails, it fails with that one's error.

Not here: what a job does (training.pipeline), when to retry (training.worker), and the change
feed's readers (core.changes).
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from core.jobs import Failure, Job, JobEvent, JobKind, JobStatus, Json, NewJob, Once, StopReason
from core.outlook import Estimate, Outlook, Progress

if TYPE_CHECKING:  # core.changes uses core.queue.connection
    from core.changes import Change


@dataclass(frozen=True)
class Claim:
    """A worker's right to run one attempt of a job; `attempt` is the fencing token."""

    job: Job
    worker: str

    @property
    def attempt(self) -> int:
        """The fencing token: it only ever grows for a job."""
        return self.job.attempt


class JobViews(Protocol):
    """What there is to see of jobs; every method may raise `Unavailable`."""

    async def get(self, tenant: str, job_id: str) -> Job | None:
        """Return the job, or None."""

    async def position(self, job: Job) -> int | None:
        """How many jobs of the tenant and kind go before this queued one; None if not queued."""

    async def outlook(self, kind: JobKind) -> Outlook:
        """Return what a forecast is made from, of all tenants.

        At most 100 running jobs and 100 tenants, whose lines share 500 jobs.
        """

    async def waiters(self, job: Job, limit: int = 100) -> builtins.list[Job]:
        """Return jobs that wait for this one and have no estimate yet."""

    async def events(
        self, tenant: str, job_id: str, *, after: str | None = None, limit: int = 100,
        newest_first: bool = False,
    ) -> list[JobEvent]:  # fmt: skip
        """Return events strictly behind `after` in the chosen direction."""

    async def wait_events(
        self, tenant: str, job_id: str, after: str | None, timeout_seconds: float
    ) -> list[JobEvent]:
        """Return the events behind `after`, oldest first, waiting for the first if none."""

    async def list(
        self, tenant: str, kind: JobKind, *, after: str | None = None, limit: int = 20
    ) -> list[Job]:
        """Return up to `limit` jobs, newest first, beginning behind the job `after`.

        The page behind an unknown job is empty.
        """

    async def unarchived(self, limit: int = 100) -> builtins.list[Job]:
        """Return ended jobs that nobody has marked as archived, oldest first.

        These are `fine_tune` jobs, and `ingest` jobs that failed.

        However a job ended, it is among them until `mark_archived`, and is not forgotten before.
        """

    async def ping(self) -> None:
        """Return if the server answers; raise `Unavailable` otherwise."""

    async def close(self) -> None:
        """Release connections."""


class JobQueue(JobViews, Protocol):
    """Every method may raise `Unavailable` when the server does not answer in time."""

    async def enqueue(self, new: NewJob) -> Job:
        """Add a job and wake a worker; with an id that exists, return that job unchanged.

        A repeated request (`NewJob.once`) makes no job, but returns the one that the first made;
        it raises what `recall` raises. That is decided together with the adding.
        Raises `Overloaded` when the tenant already has `max_queued` unfinished jobs of the kind,
        and `NotFound` when a job in `after` is unknown.
        """

    async def note_estimate(self, tenant: str, job_id: str, estimate: Estimate) -> None:
        """Note what is expected of a job; for one that is unknown or has ended, do nothing."""

    async def recall(self, tenant: str, once: Once) -> Job | None:
        """Return the job that an earlier request made and this one repeats; None if it is new.

        Raises `Conflict` when the earlier one was not the same request, or its job is no longer
        kept.
        """

    async def claim(self, kind: JobKind, worker: str, lease_seconds: float) -> Claim | None:
        """Lease the next job of `kind`, or return None when none is due.

        First takes back jobs whose lease ran out: they return to their old place in the line, or
        fail with `worker_lost` when `max_attempts` were lost; one whose cancel or pause was
        requested is cancelled or paused. Tenants take turns, and pass theirs while `max_running`
        of their jobs run; within one, higher priority goes first, then older.
        """

    async def wait(self, kind: JobKind, timeout_seconds: float) -> None:
        """Return when a job of `kind` may have become claimable, or after the timeout.

        A job that came after this queue's last empty `claim` makes it return at once.
        """

    async def heartbeat(
        self,
        claim: Claim,
        lease_seconds: float,
        progress: Progress | None = None,
        ran_seconds: float | None = None,
    ) -> StopReason | None:
        """Renew the lease; return what was requested, if anything. Raises `LeaseLost`.

        A cancel goes before a pause. While the job is publishing it is None. `ran_seconds` is what
        all attempts have run so far; the next one finds it in the job.
        """

    async def mark_publishing(self, claim: Claim, lease_seconds: float) -> StopReason | None:
        """Renew the lease and mark the job, or return what was requested and leave it.

        Raises `LeaseLost`.
        """

    async def clear_publishing(self, claim: Claim) -> Job:
        """Take back the mark, because the job has not published; what was put off counts now.

        So it may return a job that has been cancelled or paused, or failed for want of attempts,
        and is the worker's no more. Raises `LeaseLost`.
        """

    async def append_event(
        self,
        claim: Claim,
        type: str,
        message: str,
        *,
        level: str = "info",
        data: Json | None = None,
    ) -> JobEvent:
        """Append to the job's history. Raises `LeaseLost`."""

    async def announce(self, claim: Claim, change: Change, result: Json) -> None:
        """Tell every service process of a change, and note what the job has published.

        From then on the job ends as `succeeded` with `result`, whoever ends it: `settle`, or the
        next claim by anyone if the worker dies. Raises `LeaseLost`.
        """

    async def settle(
        self,
        claim: Claim,
        status: JobStatus,
        *,
        result: Json | None = None,
        error: Failure | None = None,
        seconds: float | None = None,
    ) -> Job:
        """End the job with a terminal status, once, with an event, and free what waits for it.

        `seconds` is what the attempt took. If it is the first and succeeds, they are added to what
        `outlook` tells of how far estimates are off: sums of seconds and of estimates, in which
        older jobs weigh ever less.

        Raises `LeaseLost` when the claim is not current, which includes a second settle.
        """

    async def retry(self, claim: Claim, delay_seconds: float, failure: Failure) -> Job:
        """Give the job back to run again after a delay, because of `failure`.

        With no attempt left it fails with `failure`; with a cancel or a pause requested it is
        cancelled or paused. Raises `LeaseLost`.
        """

    async def release(self, claim: Claim) -> Job:
        """Give the job back at once because the worker stops; this uses up no attempt.

        The attempt as fencing token is spent all the same. With a cancel or a pause requested the
        job is cancelled or paused. Raises `LeaseLost`.
        """

    async def mark_archived(self, job: Job) -> None:
        """Let a job that ended be forgotten after the retention; again, it changes nothing."""

    async def cancel(self, tenant: str, job_id: str, *, keep_best: bool = False) -> Job:
        """Cancel a waiting or paused job at once, or ask a running one's worker to stop.

        It comes too late for a job that is publishing, if it publishes. Terminal jobs raise
        `Conflict`, unknown ones `NotFound`.
        """

    async def pause(self, tenant: str, job_id: str) -> Job:
        """Pause a waiting job at once, or ask a running one's worker to; this uses up no attempt.

        One that is paused stays so. Terminal jobs, and those that are being cancelled or are
        publishing, raise `Conflict`; unknown ones `NotFound`.
        """

    async def resume(self, tenant: str, job_id: str) -> Job:
        """Put a paused job back into its old place in the line.

        Raises `Conflict` for jobs that are not paused, `NotFound` for unknown ones.
        """
