"""At once: a cancel and an end, two jobs of one name, and workers killed at random."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest

from core.errors import Conflict, LeaseLost
from core.jobs import JobKind, JobStatus, NewJob
from core.queue.connection import connect
from core.queue.redis import RedisJobQueue
from tests.faults.rig import ENDS, Rig
from tests.faults.worker import remove_fence

TENANT = "acme"
ROUNDS = 200
KILLING_SECONDS = 12
JOBS = 100


@pytest.fixture
async def queue(redis_url: str, prefix: str) -> AsyncIterator[RedisJobQueue]:
    queue = queue_at(redis_url, prefix)
    yield queue
    await queue.close()


def queue_at(redis_url: str, prefix: str) -> RedisJobQueue:
    return RedisJobQueue(
        connect(redis_url), prefix=prefix, max_queued=1000, max_attempts=3, retention_seconds=600
    )


async def ends_of(queue: RedisJobQueue, job_id: str) -> list[str]:
    return [e.type for e in await queue.events(TENANT, job_id) if e.type in ENDS]


async def race(queue: RedisJobQueue, job_id: str, ending: JobStatus) -> tuple[bool, bool]:
    """Cancel and settle a running job at once; tell which of the two were accepted."""
    await queue.enqueue(NewJob(tenant=TENANT, id=job_id, kind=JobKind.FINE_TUNE, spec={}))
    claim = await queue.claim(JobKind.FINE_TUNE, "w", 60)
    assert claim is not None
    cancelled, settled = await asyncio.gather(
        queue.cancel(TENANT, job_id), queue.settle(claim, ending), return_exceptions=True
    )
    assert isinstance(cancelled, Conflict) or not isinstance(cancelled, BaseException)
    assert not isinstance(settled, BaseException)
    with pytest.raises(LeaseLost):
        await queue.settle(claim, JobStatus.CANCELLED)
    with pytest.raises(Conflict):
        await queue.cancel(TENANT, job_id)
    return not isinstance(cancelled, BaseException), True


@pytest.mark.anyio
async def test_cancel_and_complete_at_once(queue: RedisJobQueue) -> None:
    outcomes = set()
    for number in range(ROUNDS):
        ending = (JobStatus.SUCCEEDED, JobStatus.CANCELLED)[number % 2]
        outcomes.add(await race(queue, f"job-{number}", ending))
        job = await queue.get(TENANT, f"job-{number}")
        assert job is not None
        assert job.status is ending
        assert await ends_of(queue, job.id) == [ending]
    assert (True, True) in outcomes


@pytest.mark.anyio
@pytest.mark.parametrize("is_fenced", [True, False], ids=["guarded", "unguarded"])
async def test_two_workers_settle_at_once(queue: RedisJobQueue, is_fenced: bool) -> None:
    """One was taken for dead; without the fence both end the job."""
    if not is_fenced:
        remove_fence(queue, queue._client)
    ends = []
    for number in range(ROUNDS // 4):
        job_id = f"job-{number}"
        await queue.enqueue(NewJob(tenant=TENANT, id=job_id, kind=JobKind.FINE_TUNE, spec={}))
        late = await queue.claim(JobKind.FINE_TUNE, "late", 0.001)
        await asyncio.sleep(0.003)
        current = await queue.claim(JobKind.FINE_TUNE, "current", 60)
        assert late is not None
        assert current is not None
        assert current.attempt == late.attempt + 1
        refused = await asyncio.gather(
            queue.settle(late, JobStatus.SUCCEEDED), queue.settle(current, JobStatus.SUCCEEDED),
            return_exceptions=True,
        )  # fmt: skip
        assert not is_fenced or isinstance(refused[0], LeaseLost)
        ends.append(len(await ends_of(queue, job_id)))
    assert set(ends) == ({1} if is_fenced else {2})


def test_two_workers_publish_one_name_at_once(rig: Rig) -> None:
    rig.keep_up(2)
    for _ in range(6):
        rig.enqueue("shared")
    rig.finish(30)
    rig.check()
    assert rig.registry.versions("default", "shared") == list(range(1, 7))
    release = rig.registry.releases.current("default", "shared")
    assert release is not None
    assert release.aliases == {"production": 6}


def test_cancels_of_jobs_that_are_publishing(rig: Rig) -> None:
    """The job ends once, and is cancelled only if nothing was published."""
    rig.keep_up(2)
    chance = random.Random(0)
    for number in range(8):
        rig.enqueue(f"model-{number}")
    waiting = list(rig.acknowledged)
    deadline = time.monotonic() + 30
    while waiting and time.monotonic() < deadline:
        for job_id in list(waiting):
            job = rig.job(job_id)
            if job.status.is_terminal:
                waiting.remove(job_id)
            elif job.progress and job.progress.fraction > 0.9 and chance.random() < 0.5:
                waiting.remove(job_id)
                try:
                    rig.run(rig.queue.cancel("default", job_id))
                except Conflict:
                    continue
    rig.finish(30)
    rig.check()


def test_workers_killed_at_random(rig: Rig) -> None:
    """Jobs of a few names, and three workers of which one is killed every so often."""
    chance = random.Random(1)
    rig.max_attempts = 20
    rig.keep_up(3)
    for number in range(JOBS):
        rig.enqueue(f"model-{number % 5}")
    deadline = time.monotonic() + KILLING_SECONDS
    killed = 0
    while time.monotonic() < deadline:
        time.sleep(chance.uniform(0.2, 0.9))
        alive = [worker for worker in rig.workers if worker.poll() is None]
        chance.choice(alive).kill()
        killed += 1
        rig.keep_up(3)
    rig.finish(150, workers=3)
    assert killed > 6
    assert {rig.job(job_id).status for job_id in rig.acknowledged} == {"succeeded"}
    rig.check()
