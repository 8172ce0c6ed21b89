"""What a `MemoryJobQueue` keeps of one job, and of one request that may be repeated.

Not here: the steps that a job takes (tests.twins.ledger).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.jobs import Failure, Job, JobEvent, StopReason


@dataclass
class Entry:
    """A job, its place in the line, and what it waits for: other jobs, a time, or its worker."""

    job: Job
    seq: int
    events: list[JobEvent] = field(default_factory=list)
    waits_for: set[str] = field(default_factory=set)
    due: float | None = None
    lease_ends: float | None = None
    losses: int = 0
    last_failure: Failure | None = None
    step: int = 0
    expires: float | None = None

    def update(self, **changes: Any) -> None:
        """Replace fields of the job."""
        self.job = self.job.model_copy(update=changes)


def wanted(job: Job) -> StopReason | None:
    """What is wanted of a running job; of one that may have published nothing is."""
    if job.publishing:
        return None
    if job.cancel_requested:
        return StopReason.CANCEL
    return StopReason.PAUSE if job.pause_requested else None


@dataclass(frozen=True)
class Request:
    """A request that may be repeated, and the job it made; `repeated_at` if it was a repeat."""

    job_id: str
    digest: str
    until: float
    repeated_at: float | None
