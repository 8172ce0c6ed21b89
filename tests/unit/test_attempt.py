"""The ends of an attempt: the job is settled, given back or left alone, and no child stays."""

from __future__ import annotations

import asyncio
import signal
from typing import cast

import pytest

from core.errors import Unavailable
from core.jobs import Failure, Job, JobKind, JobStatus, NewJob
from core.queue.memory import MemoryJobQueue
from core.queue.protocol import Claim
from tests.waiting import until
from training.attempt import Attempt
from training.process import (
    AskMessage,
    ChildProcess,
    EventMessage,
    FailedMessage,
    Message,
    RetryMessage,
    SucceededMessage,
)

pytestmark = pytest.mark.anyio
LEASE_SECONDS = 0.3
DONE = SucceededMessage(result={"fine_tuned_model": "m@1"}, model="m", version=1)
BAD = Failure(code="data_error", message="no good")


class FakeChild:
    """A child that says what it is told to, or nothing for ever, until it is ended."""

    def __init__(self, *messages: Message, ends_with: int | None = None) -> None:
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._ends_with = ends_with
        self.killed_by: signal.Signals | None = None
        self.got_go = False
        for message in messages:
            self.say(message)
        if ends_with is not None:
            self.say(None)

    def say(self, message: Message | None) -> None:
        self._messages.put_nowait(message)

    async def send_job(self, job: Job) -> None:
        pass

    async def send_go(self) -> None:
        self.got_go = True

    async def receive(self) -> Message | None:
        return await self._messages.get()

    async def wait(self) -> int:
        if self.killed_by is not None:
            return -self.killed_by
        return self._ends_with or 0

    async def stop(self, grace_seconds: float) -> None:
        self.end(signal.SIGTERM)
        await asyncio.sleep(0)

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def end(self, how: signal.Signals) -> None:
        self.killed_by = self.killed_by or how
        self.say(None)


class ForgetfulQueue(MemoryJobQueue):
    """A queue whose server can go away."""

    is_away = False

    async def heartbeat(self, *args: object, **kwargs: object) -> bool:
        if self.is_away:
            raise Unavailable("away")
        return await super().heartbeat(*args, **kwargs)  # type: ignore[arg-type]


async def claimed(queue: MemoryJobQueue, kind: JobKind = JobKind.FINE_TUNE) -> Claim:
    await queue.enqueue(NewJob(tenant="default", id="job-1", kind=kind, spec={}))
    claim = await queue.claim(kind, "worker", LEASE_SECONDS)
    assert claim is not None
    return claim


def attempt(
    queue: MemoryJobQueue,
    claim: Claim,
    child: FakeChild,
    *,
    max_seconds: float = 60,
    stopping: asyncio.Event | None = None,
) -> Attempt:
    return Attempt(
        queue,
        claim,
        cast(ChildProcess, child),
        lease_seconds=LEASE_SECONDS,
        max_seconds=max_seconds,
        stopping=stopping or asyncio.Event(),
    )


async def state(queue: MemoryJobQueue) -> Job:
    job = await queue.get("default", "job-1")
    assert job is not None
    return job


async def test_success_is_settled_with_events_and_result() -> None:
    queue = MemoryJobQueue()
    child = FakeChild(EventMessage(event="stage", message="data"), AskMessage(), DONE)
    await attempt(queue, await claimed(queue), child).run()
    job = await state(queue)
    assert (job.status, job.result) == (JobStatus.SUCCEEDED, DONE.result)
    assert child.got_go
    assert "stage" in [event.type for event in await queue.events("default", "job-1")]


async def test_failure_is_final() -> None:
    queue = MemoryJobQueue()
    await attempt(queue, await claimed(queue), FakeChild(FailedMessage(failure=BAD))).run()
    job = await state(queue)
    assert (job.status, job.error) == (JobStatus.FAILED, BAD)


async def test_retry_gives_the_job_back() -> None:
    queue = MemoryJobQueue()
    await attempt(queue, await claimed(queue), FakeChild(RetryMessage(failure=BAD))).run()
    assert (await state(queue)).status is JobStatus.QUEUED


@pytest.mark.parametrize(
    ("code", "expected"), [(-signal.SIGSEGV, "crashed"), (-signal.SIGKILL, "out_of_memory")]
)
async def test_crash_is_retried_and_in_the_end_has_its_code(code: int, expected: str) -> None:
    queue = MemoryJobQueue(max_attempts=1)
    await attempt(queue, await claimed(queue), FakeChild(ends_with=code)).run()
    job = await state(queue)
    assert job.status is JobStatus.FAILED
    assert job.error
    assert job.error.code == expected


async def test_crash_of_an_ingest_is_not_tried_again() -> None:
    queue = MemoryJobQueue(max_attempts=3)
    claim = await claimed(queue, JobKind.INGEST)
    await attempt(queue, claim, FakeChild(ends_with=-signal.SIGKILL)).run()
    assert (await state(queue)).status is JobStatus.FAILED


async def test_cancel_stops_the_child() -> None:
    queue = MemoryJobQueue()
    child = FakeChild()
    run = asyncio.create_task(attempt(queue, await claimed(queue), child).run())
    await queue.cancel("default", "job-1")
    await run
    assert (await state(queue)).status is JobStatus.CANCELLED
    assert child.killed_by is signal.SIGTERM


async def test_cancel_comes_too_late_for_a_child_that_publishes() -> None:
    queue = MemoryJobQueue()
    child = FakeChild(AskMessage())
    run = asyncio.create_task(attempt(queue, await claimed(queue), child).run())
    await until(lambda: child.got_go)
    await queue.cancel("default", "job-1")
    await asyncio.sleep(LEASE_SECONDS)  # long enough for the guard to see the request
    assert child.killed_by is None
    child.say(DONE)
    await run
    assert (await state(queue)).status is JobStatus.SUCCEEDED


async def test_time_limit_kills() -> None:
    queue = MemoryJobQueue()
    child = FakeChild()
    await attempt(queue, await claimed(queue), child, max_seconds=0.2).run()
    job = await state(queue)
    assert job.error
    assert job.error.code == "timeout"
    assert child.killed_by is signal.SIGKILL


async def test_worker_that_stops_gives_the_job_back_and_uses_up_no_attempt() -> None:
    queue = MemoryJobQueue(max_attempts=1)
    stopping = asyncio.Event()
    run = asyncio.create_task(
        attempt(queue, await claimed(queue), FakeChild(), stopping=stopping).run()
    )
    stopping.set()
    await run
    assert (await state(queue)).status is JobStatus.QUEUED


async def test_lost_lease_kills_the_child_and_leaves_the_job_alone() -> None:
    queue = MemoryJobQueue()
    claim = await claimed(queue)
    await asyncio.sleep(LEASE_SECONDS * 1.5)
    other = await queue.claim(JobKind.FINE_TUNE, "other", 60)
    assert other is not None
    child = FakeChild()
    await attempt(queue, claim, child).run()
    assert child.killed_by is signal.SIGKILL
    job = await state(queue)
    assert (job.status, job.worker, job.attempt) == (JobStatus.RUNNING, "other", 2)


async def test_worker_that_cannot_renew_for_a_lease_kills_its_child() -> None:
    queue = ForgetfulQueue()
    child = FakeChild()
    claim = await claimed(queue)
    queue.is_away = True
    await attempt(queue, claim, child).run()
    assert child.killed_by is signal.SIGKILL
    assert (await state(queue)).status is JobStatus.RUNNING
