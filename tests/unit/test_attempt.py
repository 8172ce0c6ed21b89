"""The ends of an attempt: the job is settled, given back or left alone, and no child stays."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import cast

import pytest

from core.errors import Unavailable
from core.jobs import Failure, Job, JobKind, JobStatus, NewJob, StopReason
from core.outlook import Estimate
from core.presence import Presence, Role
from core.queue.protocol import Claim
from tests.twins.memory import MemoryJobQueue
from tests.waiting import until
from training.attempt import Attempt
from training.process import (
    AskMessage,
    ChildProcess,
    EventMessage,
    FailedMessage,
    Message,
    RetryMessage,
    StoppedMessage,
    SucceededMessage,
)

pytestmark = pytest.mark.anyio
LEASE_SECONDS = 0.3
STOP_SECONDS = 2 * LEASE_SECONDS
DONE = SucceededMessage(result={"fine_tuned_model": "m@1"}, model="m", version=1)
BAD = Failure(code="data_error", message="no good")


class FakeChild:
    """A child that says what it is told to, or nothing for ever, until it is ended."""

    def __init__(
        self, *messages: Message, ends_with: int | None = None, listens: bool = True
    ) -> None:
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._ends_with = ends_with
        self.killed_by: signal.Signals | None = None
        self.got_go = False
        self.got_job = False
        self.asked_to_stop: list[StopReason] = []
        self._listens = listens
        self._ended = asyncio.Event()
        for message in messages:
            self.say(message)
        if ends_with is not None:
            self.say(None)

    def say(self, message: Message | None) -> None:
        self._messages.put_nowait(message)

    async def send_job(self, job: Job) -> None:
        self.got_job = True

    async def send_stop(self, reason: StopReason) -> None:
        self.asked_to_stop.append(reason)
        if self._listens:
            self.say(StoppedMessage(reason=reason))
            self._ended.set()

    async def ends_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)
        return self._ended.is_set()

    async def send_go(self) -> None:
        self.got_go = True

    async def receive(self) -> Message | None:
        return await self._messages.get()

    async def wait(self) -> int:
        if self.killed_by is not None:
            return -self.killed_by
        return self._ends_with or 0

    async def stop(self, grace_seconds: float) -> None:
        if not self._ended.is_set():
            self.end(signal.SIGTERM)
        await asyncio.sleep(0)

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def end(self, how: signal.Signals) -> None:
        if not self._ended.is_set():
            self.killed_by = self.killed_by or how
        self._ended.set()
        self.say(None)


class ForgetfulQueue(MemoryJobQueue):
    """A queue whose server can go away."""

    is_away = False

    async def heartbeat(self, *args: object, **kwargs: object) -> StopReason | None:
        if self.is_away:
            raise Unavailable("away")
        return await super().heartbeat(*args, **kwargs)  # type: ignore[arg-type]


class FakePresence(Presence):
    """Service processes that have said what they are to say."""

    def __init__(self, live: Collection[str] = (), acks: dict[str, bool] | None = None) -> None:
        self._live = set(live)
        self._acks = acks or {}

    async def live(self, role: Role) -> set[str]:
        return self._live

    async def acknowledged(self, tenant: str, model: str, version: int) -> dict[str, bool]:
        return self._acks


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
    has_published: bool = False,
    presence: Presence | None = None,
) -> Attempt:
    return Attempt(
        queue,
        claim,
        cast(ChildProcess, child),
        lease_seconds=LEASE_SECONDS,
        max_seconds=max_seconds,
        stop_seconds=STOP_SECONDS,
        stopping=stopping or asyncio.Event(),
        withdraw=_answer(not has_published),
        expect=_expect,
        presence=presence or FakePresence(),
    )


async def _expect(job: Job) -> Estimate | None:
    """What is expected of the job `small`, and of no other."""
    return Estimate(pace="p", stages={"fit": 2.0}) if job.id == "small" else None


def _answer(withdraws: bool) -> Callable[[Job], Awaitable[bool]]:
    async def withdraw(_: Job) -> bool:
        return withdraws

    return withdraw


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


async def test_a_file_that_was_parsed_tells_how_long_its_jobs_will_take() -> None:
    queue = MemoryJobQueue()
    claim = await claimed(queue, JobKind.INGEST)
    for id in ("small", "unknown"):
        await queue.enqueue(
            NewJob(tenant="default", id=id, kind=JobKind.FINE_TUNE, spec={}, after=("job-1",))
        )
    await attempt(queue, claim, FakeChild(SucceededMessage(result={}, seconds=1.0))).run()
    found = [await queue.get("default", id) for id in ("small", "unknown")]
    assert [job and (job.status, job.estimate and job.estimate.seconds) for job in found] == [
        (JobStatus.QUEUED, 2.0), (JobStatus.QUEUED, None),
    ]  # fmt: skip


async def test_what_a_job_took_is_learned() -> None:
    queue = MemoryJobQueue()
    estimate = Estimate(pace="p", stages={"fit": 2.0})
    await queue.enqueue(
        NewJob(tenant="default", id="j", kind=JobKind.FINE_TUNE, spec={}, estimate=estimate)
    )
    claim = await queue.claim(JobKind.FINE_TUNE, "w", LEASE_SECONDS)
    assert claim is not None
    await attempt(queue, claim, FakeChild(SucceededMessage(result={}, seconds=6.0))).run()
    assert (await queue.outlook(JobKind.FINE_TUNE)).ratios == {"p": 3.0}


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


@pytest.mark.parametrize("listens", [True, False])
async def test_cancel_asks_the_child_and_ends_one_that_does_not_listen(listens: bool) -> None:
    queue = MemoryJobQueue()
    child = FakeChild(listens=listens)
    run = asyncio.create_task(attempt(queue, await claimed(queue), child).run())
    await queue.cancel("default", "job-1")
    await run
    assert (await state(queue)).status is JobStatus.CANCELLED
    assert child.asked_to_stop == [StopReason.CANCEL]
    assert child.killed_by is (None if listens else signal.SIGTERM)


async def test_pause_gives_the_job_back_as_paused() -> None:
    queue = MemoryJobQueue(max_attempts=1)
    child = FakeChild()
    run = asyncio.create_task(attempt(queue, await claimed(queue), child).run())
    await queue.pause("default", "job-1")
    await run
    assert (await state(queue)).status is JobStatus.PAUSED
    assert child.asked_to_stop == [StopReason.PAUSE]


async def test_child_that_saves_its_state_keeps_its_lease_until_its_time_is_over() -> None:
    queue = MemoryJobQueue()
    child = FakeChild(listens=False)
    run = asyncio.create_task(attempt(queue, await claimed(queue), child).run())
    await queue.pause("default", "job-1")
    await until(lambda: bool(child.asked_to_stop))
    await asyncio.sleep(1.5 * LEASE_SECONDS)
    assert child.killed_by is None
    assert await queue.claim(JobKind.FINE_TUNE, "other", 60) is None
    await run
    assert child.killed_by is signal.SIGTERM
    assert (await state(queue)).status is JobStatus.PAUSED


async def test_cancel_overtakes_a_pause() -> None:
    queue = MemoryJobQueue()
    child = FakeChild(listens=False)
    run = asyncio.create_task(attempt(queue, await claimed(queue), child).run())
    await queue.pause("default", "job-1")
    await until(lambda: bool(child.asked_to_stop))
    await queue.cancel("default", "job-1")
    await run
    assert (await state(queue)).status is JobStatus.CANCELLED


async def test_failure_that_came_before_the_stop_counts() -> None:
    queue = MemoryJobQueue()
    child = FakeChild(listens=False)
    run = asyncio.create_task(attempt(queue, await claimed(queue), child).run())
    await queue.pause("default", "job-1")
    await until(lambda: bool(child.asked_to_stop))
    child.say(FailedMessage(failure=BAD))
    await run
    assert (await state(queue)).error == BAD


@pytest.mark.parametrize("is_cancel", [True, False])
async def test_child_that_asks_gets_no_leave_when_something_else_is_wanted(
    is_cancel: bool,
) -> None:
    queue = MemoryJobQueue()
    claim = await claimed(queue)
    await (queue.cancel if is_cancel else queue.pause)("default", "job-1")
    child = FakeChild(AskMessage())
    await attempt(queue, claim, child).run()
    assert not child.got_go
    wanted = JobStatus.CANCELLED if is_cancel else JobStatus.PAUSED
    assert (await state(queue)).status is wanted


async def test_failure_after_leave_is_left_to_an_attempt_that_looks() -> None:
    queue = MemoryJobQueue(max_attempts=1)
    child = FakeChild(AskMessage(), FailedMessage(failure=BAD))
    await attempt(queue, await claimed(queue), child).run()
    job = await state(queue)
    assert (job.status, job.publishing) == (JobStatus.QUEUED, True)


@pytest.mark.parametrize("has_published", [True, False])
async def test_next_attempt_looks_before_all_else(has_published: bool) -> None:
    queue = MemoryJobQueue()
    first = await claimed(queue)
    await queue.mark_publishing(first, LEASE_SECONDS)
    await queue.cancel("default", "job-1")
    await queue.retry(first, 0, BAD)
    claim = await queue.claim(JobKind.FINE_TUNE, "next", LEASE_SECONDS)
    assert claim is not None
    child = FakeChild(AskMessage(), DONE)
    await attempt(queue, claim, child, has_published=has_published).run()
    assert child.got_job is has_published
    wanted = JobStatus.SUCCEEDED if has_published else JobStatus.CANCELLED
    assert (await state(queue)).status is wanted


@pytest.mark.parametrize("acks", [{"a": True, "b": True}, {"a": True, "b": False}, {"a": True}])
async def test_serving_is_told_before_the_end(
    acks: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.acknowledgement.WAIT_SECONDS", 0.1)
    queue = MemoryJobQueue()
    child = FakeChild(AskMessage(), DONE)
    presence = FakePresence({"a", "b"}, acks)
    await attempt(queue, await claimed(queue), child, presence=presence).run()
    *_, serving, last = await queue.events("default", "job-1")
    assert (serving.type, last.type) == ("serving", "succeeded")
    served = sum(acks.values())
    assert serving.data == {"acknowledged": served, "refused": len(acks) - served, "of": 2}


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


async def test_the_time_of_all_attempts_counts() -> None:
    queue = MemoryJobQueue()
    claim = await claimed(queue)
    await queue.heartbeat(claim, LEASE_SECONDS, ran_seconds=59.8)
    await queue.release(claim)
    again = await queue.claim(JobKind.FINE_TUNE, "worker", LEASE_SECONDS)
    assert again is not None
    child = FakeChild()
    await asyncio.wait_for(attempt(queue, again, child, max_seconds=60).run(), 30)
    job = await state(queue)
    assert job.error
    assert job.error.code == "timeout"
    assert job.ran_seconds > 59.8


async def test_an_attempt_without_time_still_finds_what_was_published() -> None:
    queue = MemoryJobQueue()
    claim = await claimed(queue)
    await queue.mark_publishing(claim, LEASE_SECONDS)
    await queue.heartbeat(claim, LEASE_SECONDS, ran_seconds=1000)
    await queue.release(claim)
    again = await queue.claim(JobKind.FINE_TUNE, "worker", LEASE_SECONDS)
    assert again is not None
    child = FakeChild()
    run = asyncio.create_task(attempt(queue, again, child, has_published=True).run())
    await asyncio.sleep(LEASE_SECONDS)  # long enough for the guard to look at the time
    child.say(DONE)
    await run
    assert (await state(queue)).status is JobStatus.SUCCEEDED


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
