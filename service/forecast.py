"""When a queued job will start and how long a running one will still take, as far as is known.

Everything comes from what was measured: how long recent jobs of the same model and strategy took
(an average that the queue keeps), what runs and waits now, and how many workers live. What was
never measured is None. The size of the data is not looked at, so a data set unlike the recent ones
is forecast badly; `bench/jobs.py` prints the error. Not here: what a job will take before there is
one (service.estimate).
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass

from core.jobs import Job, JobKind, JobStatus, Json, Outlook, pace_name
from core.presence import Presence, Role
from core.queue import JobQueue

KEPT_SECONDS = 0.5
"""How long one picture serves, so that a page of a hundred jobs asks once."""
MIN_FRACTION = 0.2
"""Below it, how far a job is tells too little of how long it takes."""


@dataclass(frozen=True)
class Forecast:
    """Unix time of a queued job's start, and seconds until a running one ends; None if unknown."""

    estimated_start: float | None = None
    seconds_remaining: float | None = None


class Forecaster:
    """Forecasts `fine_tune` jobs; may raise `Unavailable`."""

    def __init__(self, queue: JobQueue, presence: Presence) -> None:
        self._queue = queue
        self._presence = presence
        self._picture: tuple[float, Outlook, int] = (-math.inf, Outlook(now=0), 0)

    async def forecast(self, job: Job, position: int | None) -> Forecast:
        """Forecast a job as it is now; `position` is its place in its tenant's line."""
        if job.status not in (JobStatus.RUNNING, JobStatus.QUEUED):
            return Forecast()
        taken_at, outlook, workers = self._picture
        if time.monotonic() - taken_at > KEPT_SECONDS:
            outlook = await self._queue.outlook(JobKind.FINE_TUNE)
            workers = len(await self._presence.live(Role.WORKER))
            self._picture = time.monotonic(), outlook, workers
        if job.status is JobStatus.RUNNING:
            return Forecast(seconds_remaining=seconds_remaining(job, outlook))
        if position is None:  # it waits for the end of a delay
            return Forecast()
        return Forecast(estimated_start=estimated_start(job, position, outlook, workers))


def seconds_remaining(job: Job, outlook: Outlook) -> float | None:
    """What the job says itself, or what recent jobs took, or what its progress leads to."""
    if job.progress is not None and job.progress.seconds_remaining is not None:
        return job.progress.seconds_remaining
    if job.claimed_at is None:
        return None
    elapsed, usual = max(0.0, outlook.now - job.claimed_at), _usual(job.spec, outlook)
    if usual is not None and elapsed < usual:
        return round(usual - elapsed, 1)
    # Unknown, or longer than usual already: its own progress knows better.
    fraction = job.progress.fraction if job.progress else 0.0
    return round(elapsed * (1 - fraction) / fraction, 1) if fraction >= MIN_FRACTION else None


def estimated_start(job: Job, position: int, outlook: Outlook, workers: int) -> float | None:
    """When a worker will be free for the job behind all that go before it.

    Each worker takes jobs one after another, each as long as this one usually takes.
    """
    workers = max(workers, len(outlook.running))
    usual = _usual(job.spec, outlook)
    ahead = _ahead(job.tenant, position, outlook)
    if workers == 0:
        return None
    if len(outlook.running) + ahead < workers:
        return outlook.now
    free_at = []
    for each in outlook.running:
        seconds = _usual(each.spec, outlook)
        if seconds is None:
            return None
        free_at.append(max(0.0, seconds - (outlook.now - each.claimed_at)))
    if usual is None and ahead > 0:
        return None
    free_at += [0.0] * (workers - len(free_at))
    heapq.heapify(free_at)
    rounds, rest = divmod(ahead, workers)
    for _ in range(rest):
        heapq.heapreplace(free_at, free_at[0] + (usual or 0.0))
    return round(outlook.now + free_at[0] + rounds * (usual or 0.0), 1)


def _ahead(tenant: str, position: int, outlook: Outlook) -> int:
    """How many jobs start before: tenants take turns, beginning with the first."""
    tenants = list(outlook.pending)
    turn = tenants.index(tenant) if tenant in tenants else len(tenants)
    others = sum(
        min(outlook.pending[other], position + (place < turn))
        for place, other in enumerate(tenants)
        if other != tenant
    )
    return position + others


def _usual(spec: Json, outlook: Outlook) -> float | None:
    name = pace_name(spec)
    return None if name is None else outlook.paces.get(name)
