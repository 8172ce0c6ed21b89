"""When a queued job will start and how long a running one will still take, as far as is known.

Each job has an estimate from the size of its data (core.estimate); the queue keeps by what factor
those of late were wrong. What a running job has done, it says itself. From these, from what runs
and waits now, and from how many workers live, the jobs are dealt out to the workers as they will
come. What nothing is known of is None; `bench/jobs.py` prints the error. Caps on a tenant's running
jobs, and retries to come, are not looked at.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean

from core.jobs import Job, JobKind, JobStatus
from core.outlook import STAGES, Estimate, Outlook, Progress, Running
from core.presence import Presence, Role
from core.queue import JobQueue

KEPT_SECONDS = 0.5
"""How long one picture serves, so that a page of a hundred jobs asks once."""
MIN_FRACTION = 0.2
"""Without an estimate, how far a job is tells too little below it of how long it takes."""
NEXT_CHILD_SECONDS = 2.1
"""From a job's end until its worker claims the next: a child starts and imports torch. These two
were measured on 2 cores; a slower machine is slower with them than is said here."""
WARM_UP_SECONDS = 1.6
"""What such a child then does before it takes up its job (training.warm_up)."""
MEASURED, MEASURED_UNTIL = "features", "inspect"
"""The stage that tells how far it is; of the others only the beginning is known."""


@dataclass(frozen=True)
class Forecast:
    """Unix time of a queued job's start, and seconds until a running one ends; None if unknown."""

    estimated_start: float | None = None
    seconds_remaining: float | None = None


@dataclass(frozen=True)
class Schedule:
    """When pending jobs start, by tenant, in the order of its line: Unix time, or infinity.

    Of those that are not listed, one starts every `interval` seconds from `then` on.
    """

    outlook: Outlook
    starts: dict[str, list[float]] = field(default_factory=dict)
    then: float = math.inf
    interval: float = math.inf

    def shows(self, tenant: str, position: int | None) -> bool:
        """Tell whether a tenant's line was as long as that when this was drawn up."""
        line = self.outlook.pending.get(tenant)
        return position is None or (line is not None and position < line.count)

    def start(self, tenant: str, position: int) -> float | None:
        """Return when the job at `position` of a tenant's line starts; None if it is not known."""
        line = self.starts.get(tenant, [])
        if position < len(line):
            at = line[position]
        else:
            between = _ahead(tenant, position, self.outlook) - sum(map(len, self.starts.values()))
            at = self.then + (self.interval * between if between > 0 else 0)
        return round(at, 1) if math.isfinite(at) else None


class Forecaster:
    """Forecasts `fine_tune` jobs; may raise `Unavailable`."""

    def __init__(self, queue: JobQueue, presence: Presence) -> None:
        self._queue = queue
        self._presence = presence
        self._taken_at = -math.inf
        self._schedule = Schedule(Outlook(now=0))

    async def forecast(self, job: Job, position: int | None) -> Forecast:
        """Forecast a job as it is now; `position` is its place in its tenant's line."""
        if job.status not in (JobStatus.RUNNING, JobStatus.QUEUED):
            return Forecast()
        is_old = time.monotonic() - self._taken_at > KEPT_SECONDS
        # Jobs that were posted one after another are not in the picture of the first.
        if is_old or not self._schedule.shows(job.tenant, position):
            outlook = await self._queue.outlook(JobKind.FINE_TUNE)
            workers = len(await self._presence.live(Role.WORKER))
            self._schedule, self._taken_at = schedule(outlook, workers), time.monotonic()
        if job.status is JobStatus.RUNNING:
            return Forecast(seconds_remaining=seconds_remaining(job, self._schedule.outlook))
        if position is None:  # it waits for the end of a delay
            return Forecast()
        return Forecast(estimated_start=self._schedule.start(job.tenant, position))


def seconds_remaining(job: Job | Running, outlook: Outlook) -> float | None:
    """What is expected of the job, corrected by how it goes.

    The whole is a mean of what was expected and of what the part that is done took, weighted by
    that part.
    """
    if job.claimed_at is None:
        return None
    elapsed = max(0.0, outlook.now - job.claimed_at)
    expected = _expected(job.estimate, outlook)
    if job.estimate is None or expected is None:
        # Nothing else is known than what the job says.
        fraction = job.progress.fraction if job.progress else 0.0
        return round(elapsed * (1 - fraction) / fraction, 1) if fraction >= MIN_FRACTION else None
    if job.progress is None:
        return round(expected, 1)  # its child is about to begin
    done = _share_done(job.progress, job.estimate, elapsed / expected)
    return round((1 - done) * ((1 - done) * expected + elapsed), 1)


def schedule(outlook: Outlook, workers: int) -> Schedule:
    """Deal the pending jobs out, tenant by tenant, to whichever worker is free first."""
    workers = max(workers, len(outlook.running))
    if workers == 0:
        return Schedule(outlook)
    pending = list(_turns(outlook))
    known = [_slot(estimate, outlook) for _, estimate in pending]
    known += [_slot(each.estimate, outlook) for each in outlook.running]
    # A job of which nothing is known counts like the others.
    usual = fmean(found) if (found := [s for s in known if s is not None]) else math.inf
    free_at = [outlook.now] * (workers - len(outlook.running))
    for each in outlook.running:
        left = seconds_remaining(each, outlook)
        free_at.append(outlook.now + (usual if left is None else left + NEXT_CHILD_SECONDS))
    heapq.heapify(free_at)
    starts = defaultdict[str, list[float]](list)
    for tenant, estimate in pending:
        slot = _slot(estimate, outlook)
        starts[tenant].append(free_at[0])
        heapq.heapreplace(free_at, free_at[0] + (usual if slot is None else slot))
    return Schedule(outlook, starts, free_at[0], usual / workers)


def _turns(outlook: Outlook) -> Iterator[tuple[str, Estimate | None]]:
    """Yield the pending jobs that are told, in the order in which they will start."""
    lines = deque((tenant, deque(line.first)) for tenant, line in outlook.pending.items())
    while lines:
        tenant, line = lines.popleft()
        if line:
            yield tenant, line.popleft()
            lines.append((tenant, line))


def _ahead(tenant: str, position: int, outlook: Outlook) -> int:
    """How many jobs start before: tenants take turns, beginning with the first."""
    tenants = list(outlook.pending)
    turn = tenants.index(tenant) if tenant in tenants else len(tenants)
    others = sum(
        min(outlook.pending[other].count, position + (place < turn))
        for place, other in enumerate(tenants)
        if other != tenant
    )
    return position + others


def _expected(estimate: Estimate | None, outlook: Outlook) -> float | None:
    """Return the seconds of an estimate, by what was learned of such."""
    if estimate is None:
        return None
    ratio = outlook.ratios.get(estimate.pace, None if estimate.is_rough else 1.0)
    return None if ratio is None or not estimate.seconds else ratio * estimate.seconds


def _slot(estimate: Estimate | None, outlook: Outlook) -> float | None:
    """Return how long a job keeps its worker from the next one."""
    seconds = _expected(estimate, outlook)
    return None if seconds is None else WARM_UP_SECONDS + seconds + NEXT_CHILD_SECONDS


def _share_done(progress: Progress, estimate: Estimate, elapsed_share: float) -> float:
    """Return what part of its time a job has behind it, as its stages are expected to take it.

    Within a stage that does not tell how far it is, time goes on as expected, to the stage's end.
    """
    if progress.stage not in STAGES:
        return min(elapsed_share, progress.fraction)
    names = list(STAGES)
    before = names[: names.index(progress.stage)]
    begin = sum(estimate.stages.get(name, 0.0) for name in before) / estimate.seconds
    end = begin + estimate.stages.get(progress.stage, 0.0) / estimate.seconds
    if progress.stage == MEASURED:
        low, high = STAGES[MEASURED], STAGES[MEASURED_UNTIL]
        within = (progress.fraction - low) / (high - low)
        return begin + min(max(within, 0.0), 1.0) * (end - begin)
    return min(max(begin, elapsed_share), end)
