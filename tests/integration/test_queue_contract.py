"""The contract of `JobQueue` and `ChangeFeed`, asked of Redis and of the in-memory twin alike.

Leases are a fraction of a second; everything else waits for an event, with a deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest

from core.changes import Change, ChangeFeed, RedisChangeFeed
from core.errors import Conflict, InvalidRequest, LeaseLost, NotFound, Overloaded
from core.jobs import Failure, Job, JobKind, JobStatus, NewJob, Once, StopReason
from core.outlook import Progress
from core.queue import Claim, JobQueue
from core.queue.connection import connect
from core.queue.redis import RedisJobQueue
from tests.twins.feed import MemoryChangeFeed
from tests.twins.memory import MemoryJobQueue

pytestmark = pytest.mark.anyio

LEASE = 0.2
LONG = 60.0
DEADLINE = 10.0
PROMPT = 1.0
TUNE = JobKind.FINE_TUNE
BAD_DATA = Failure(code="data_error", message="line 3: no label", param="training_file")
CRASH = Failure(code="crashed", message="segmentation fault")


@dataclass
class Backend:
    """Makes queues that are one queue where the backend can share, and reads their feed."""

    make: Callable[..., JobQueue]
    feed: ChangeFeed


@pytest.fixture(params=["memory", "redis"])
async def backend(request: pytest.FixtureRequest, prefix: str) -> AsyncIterator[Backend]:
    if request.param == "memory":
        feed = MemoryChangeFeed()
        yield Backend(lambda **limits: MemoryJobQueue(changes=feed, **limits), feed)
        return
    client = connect(request.getfixturevalue("redis_url"))

    def make(
        max_queued: int = 1_000,
        max_attempts: int = 3,
        retention_seconds: int = 600,
        max_running: int = 0,
    ) -> JobQueue:
        return RedisJobQueue(
            client,
            prefix=prefix,
            max_queued=max_queued,
            max_attempts=max_attempts,
            retention_seconds=retention_seconds,
            max_running=max_running,
        )

    yield Backend(make, RedisChangeFeed(client, prefix=prefix))
    await client.aclose()


@pytest.fixture
def queue(backend: Backend) -> JobQueue:
    return backend.make()


def new_job(id: str, tenant: str = "acme", **fields: Any) -> NewJob:
    return NewJob(tenant=tenant, id=id, **{"kind": TUNE, "spec": {"model": "minilm"}, **fields})


async def next_claim(queue: JobQueue, worker: str = "w", lease_seconds: float = LONG) -> Claim:
    """Claim as a worker does: try, wait to be woken, try again."""
    deadline = time.monotonic() + DEADLINE
    while (remaining := deadline - time.monotonic()) > 0:
        if claim := await queue.claim(TUNE, worker, lease_seconds):
            return claim
        await queue.wait(TUNE, remaining)
    raise AssertionError("nothing to claim")


async def lease_ends() -> None:
    """Let a lease that has just begun run out: time itself is what is waited for."""
    await asyncio.sleep(LEASE + 0.05)


async def taken_over(queue: JobQueue, first: str = "a", second: str = "b") -> tuple[Claim, Claim]:
    """Return a claim whose lease ran out, and that of the worker who has the job now."""
    await queue.enqueue(new_job("j"))
    old = await next_claim(queue, first, LEASE)
    return old, await next_claim(queue, second)


async def types(queue: JobQueue, job_id: str) -> list[str]:
    return [event.type for event in await queue.events("acme", job_id)]


async def status(queue: JobQueue, job_id: str) -> JobStatus:
    job = await queue.get("acme", job_id)
    assert job is not None
    return job.status


class TestOrder:
    async def test_older_goes_first_and_higher_priority_before_that(self, queue: JobQueue) -> None:
        for id, priority in [("a", 0), ("b", 0), ("c", 100), ("d", -100), ("e", 100), ("f", 1)]:
            await queue.enqueue(new_job(id, priority=priority))
        jobs = [cast(Job, await queue.get("acme", id)) for id in "abcdef"]
        assert [await queue.position(job) for job in jobs] == [3, 4, 0, 5, 1, 2]
        claimed = [(await next_claim(queue)).job.id for _ in range(6)]
        assert claimed == ["c", "e", "f", "a", "b", "d"]
        assert await queue.position(jobs[0]) is None

    async def test_tenants_take_turns(self, queue: JobQueue) -> None:
        for id in ("a1", "a2", "a3"):
            await queue.enqueue(new_job(id, priority=100))
        await queue.enqueue(new_job("b1", "bolt"))
        await queue.enqueue(new_job("c1", "cone"))
        claimed = [(await next_claim(queue)).job.id for _ in range(5)]
        assert claimed == ["a1", "b1", "c1", "a2", "a3"]

    async def test_tenant_that_comes_back_does_not_starve_the_others(self, queue: JobQueue) -> None:
        for n in range(3):
            await queue.enqueue(new_job(f"a{n}"))
        claimed = []
        for n in range(3):
            await queue.enqueue(new_job(f"b{n}", "bolt"))
            claimed += [(await next_claim(queue)).job.tenant for _ in range(2)]
        assert claimed == ["acme", "bolt"] * 3

    async def test_kinds_have_lines_of_their_own(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j", kind=JobKind.INGEST))
        assert await queue.claim(TUNE, "w", LONG) is None
        assert await queue.claim(JobKind.INGEST, "w", LONG) is not None

    async def test_concurrent_workers_run_each_job_once(self, queue: JobQueue) -> None:
        runs: Counter[str] = Counter()

        async def work(worker: str) -> None:
            while claim := await queue.claim(TUNE, worker, LONG):
                runs[claim.job.id] += 1
                await queue.append_event(claim, "step", "worked")
                await queue.settle(claim, JobStatus.SUCCEEDED)

        ids = [f"j{n}" for n in range(50)]
        await asyncio.gather(*(queue.enqueue(new_job(id, f"t{id[-1]}")) for id in ids))
        await asyncio.gather(*(work(f"w{n}") for n in range(5)))
        assert runs == Counter(ids)


class TestRecord:
    async def test_life_of_a_job(self, queue: JobQueue) -> None:
        before = time.time()
        job = await queue.enqueue(new_job("j", spec={"text": "naïve ✓", "n": [1, 2.5, None]}))
        assert (job.status, job.attempt, job.worker) == (JobStatus.QUEUED, 0, None)
        assert job.spec == {"text": "naïve ✓", "n": [1, 2.5, None]}
        assert before - 1 < job.created_at < time.time() + 1

        claim = await next_claim(queue, "worker/1")
        assert claim.job.status is JobStatus.RUNNING
        assert (claim.attempt, claim.job.worker) == (1, "worker/1")
        assert claim.job.started_at is not None

        progress = Progress(stage="fit", fraction=0.5, seconds_remaining=3)
        assert await queue.heartbeat(claim, LONG, progress, 12.5) is None
        assert await queue.heartbeat(claim, LONG) is None
        running = await queue.get("acme", "j")
        assert running is not None
        assert (running.progress, running.ran_seconds) == (progress, 12.5)

        done = await queue.settle(claim, JobStatus.SUCCEEDED, result={"model": "m@1"})
        assert (done.status, done.result, done.error) == (
            JobStatus.SUCCEEDED, {"model": "m@1"}, None,
        )  # fmt: skip
        assert done.finished_at is not None
        assert done.progress is None
        assert await queue.get("acme", "j") == done
        assert await types(queue, "j") == ["queued", "started", "succeeded"]
        assert await queue.claim(TUNE, "w", LONG) is None

    async def test_enqueue_again_changes_nothing(self, queue: JobQueue) -> None:
        first = await queue.enqueue(new_job("j"))
        assert await queue.enqueue(new_job("j", priority=5, spec={}, after=("gone",))) == first
        claim = await next_claim(queue)
        assert await queue.enqueue(new_job("j")) == claim.job
        assert await queue.claim(TUNE, "w", LONG) is None
        assert await types(queue, "j") == ["queued", "started"]

    async def test_unknown_and_other_tenants_jobs_look_the_same(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        assert await queue.get("bolt", "j") is None
        assert await queue.events("bolt", "j") == []
        with pytest.raises(NotFound):
            await queue.cancel("bolt", "j")
        with pytest.raises(NotFound):
            await queue.enqueue(new_job("k", "bolt", after=("j",)))

    async def test_overload_counts_unfinished_jobs_of_tenant_and_kind(
        self, backend: Backend
    ) -> None:
        queue = backend.make(max_queued=4)
        await queue.enqueue(new_job("running", priority=1))
        claim = await next_claim(queue)
        await queue.enqueue(new_job("delayed", priority=1))
        await queue.retry(await next_claim(queue), LONG, CRASH)
        await queue.enqueue(new_job("waiting", after=("running",)))
        await queue.enqueue(new_job("queued"))
        with pytest.raises(Overloaded) as refusal:
            await queue.enqueue(new_job("more"))
        assert refusal.value.retry_after_seconds > 0
        assert await queue.get("acme", "more") is None
        await queue.enqueue(new_job("queued"))
        await queue.enqueue(new_job("more", "bolt"))
        await queue.enqueue(new_job("more", kind=JobKind.INGEST))
        await queue.settle(claim, JobStatus.FAILED, error=BAD_DATA)  # "waiting" fails with it
        await queue.enqueue(new_job("fifth"))
        await queue.enqueue(new_job("sixth"))
        with pytest.raises(Overloaded):
            await queue.enqueue(new_job("seventh"))

    async def test_list_pages_newest_first(self, queue: JobQueue) -> None:
        for n in range(7):
            await queue.enqueue(new_job(f"j{n}"))
        await queue.enqueue(new_job("other", "bolt"))
        await queue.enqueue(new_job("other", kind=JobKind.INGEST))
        after = None
        for expected in (["j6", "j5", "j4"], ["j3", "j2", "j1"], ["j0"]):
            page = await queue.list("acme", TUNE, after=after, limit=3)
            assert [job.id for job in page] == expected
            after = page[-1].id
        assert await queue.list("acme", TUNE, after="j0") == []
        assert await queue.list("acme", TUNE, after="gone") == []

    async def test_finished_job_is_forgotten_after_the_retention(self, backend: Backend) -> None:
        queue = backend.make(retention_seconds=1)
        for id in ("a", "b", "c"):
            await queue.enqueue(new_job(id))
        done = await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED)
        await queue.mark_archived(done)
        deadline = time.monotonic() + DEADLINE
        while await queue.get("acme", "a"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert [job.id for job in await queue.list("acme", TUNE)] == ["c", "b"]
        assert await queue.events("acme", "a") == []


def keyed(id: str, digest: str = "d", seconds: int = 60, **fields: Any) -> NewJob:
    """A request with an idempotency key."""
    return new_job(id, once=Once(name="key", digest=digest, seconds=seconds), **fields)


def tried(id: str, is_repeat: bool = False, age_seconds: float = 0) -> NewJob:
    """A request without one, of a client that says which try it is."""
    once = Once(name="body", digest="d", seconds=60, is_repeat=is_repeat, age_seconds=age_seconds)
    return new_job(id, once=once)


class TestOnce:
    async def test_a_repeated_request_gets_the_first_ones_job(self, queue: JobQueue) -> None:
        first = await queue.enqueue(keyed("j", priority=3))
        assert await queue.enqueue(keyed("k")) == first
        assert await queue.get("acme", "k") is None
        claim = await next_claim(queue)
        assert await queue.enqueue(keyed("k")) == claim.job
        done = await queue.settle(claim, JobStatus.SUCCEEDED)
        assert await queue.enqueue(keyed("k")) == done
        assert await queue.claim(TUNE, "w", LONG) is None

    async def test_requests_at_the_same_time_make_one_job(self, queue: JobQueue) -> None:
        jobs = await asyncio.gather(*(queue.enqueue(keyed(f"j{n}")) for n in range(20)))
        assert len({job.id for job in jobs}) == 1
        assert len(await queue.list("acme", TUNE)) == 1

    async def test_another_request_of_the_same_name_is_refused(self, queue: JobQueue) -> None:
        await queue.enqueue(keyed("j"))
        other = keyed("k", "e")
        assert other.once is not None
        for attempt in (queue.enqueue(other), queue.recall("acme", other.once)):
            with pytest.raises(Conflict) as refusal:
                await attempt
            assert refusal.value.error_code == "idempotency_key_reused"
        assert [job.id for job in await queue.list("acme", TUNE)] == ["j"]

    async def test_names_are_a_tenants_own(self, queue: JobQueue) -> None:
        await queue.enqueue(keyed("j"))
        assert (await queue.enqueue(keyed("k", "e", tenant="bolt"))).id == "k"

    async def test_a_name_may_be_used_anew_when_its_time_is_over(self, queue: JobQueue) -> None:
        await queue.enqueue(keyed("j", seconds=1))
        deadline = time.monotonic() + DEADLINE
        while (job := await queue.enqueue(keyed("k", seconds=1))).id == "j":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert job.id == "k"
        assert (await queue.enqueue(keyed("l"))).id == "k"

    async def test_a_repeat_does_not_prolong_the_time(self, queue: JobQueue) -> None:
        await queue.enqueue(keyed("j", seconds=1))
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            last = await queue.enqueue(keyed("k", "d", seconds=60))
            await asyncio.sleep(0.05)
        assert last.id == "k"

    async def test_no_second_job_when_the_first_is_no_longer_kept(self, backend: Backend) -> None:
        queue = backend.make(retention_seconds=1)
        await queue.enqueue(keyed("j"))
        # The retention begins when the job has been archived.
        await queue.mark_archived(await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED))
        deadline = time.monotonic() + DEADLINE
        while await queue.get("acme", "j"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        with pytest.raises(Conflict, match="no longer kept"):
            await queue.enqueue(keyed("k"))
        assert await queue.get("acme", "k") is None

    async def test_a_request_that_made_no_job_is_not_remembered(self, backend: Backend) -> None:
        queue = backend.make(max_queued=1)
        with pytest.raises(NotFound):
            await queue.enqueue(keyed("j", after=("gone",)))
        await queue.enqueue(new_job("other"))
        with pytest.raises(Overloaded):
            await queue.enqueue(keyed("j"))
        assert await queue.recall("acme", Once(name="key", digest="d", seconds=60)) is None
        await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED)
        assert (await queue.enqueue(keyed("j", "e"))).id == "j"

    async def test_a_repeat_is_answered_while_the_queue_is_full(self, backend: Backend) -> None:
        queue = backend.make(max_queued=1)
        first = await queue.enqueue(keyed("j"))
        assert await queue.enqueue(keyed("k")) == first

    async def test_recall_finds_without_adding(self, queue: JobQueue) -> None:
        once = Once(name="key", digest="d", seconds=60)
        assert await queue.recall("acme", once) is None
        job = await queue.enqueue(keyed("j"))
        assert await queue.recall("acme", once) == job
        assert await queue.recall("bolt", once) is None

    async def test_first_tries_always_make_a_job_and_retries_take_the_latest(
        self, queue: JobQueue
    ) -> None:
        assert [(await queue.enqueue(tried(id))).id for id in "ab"] == ["a", "b"]
        assert [(await queue.enqueue(tried(id, is_repeat=True))).id for id in "cd"] == ["b", "b"]
        assert (await queue.enqueue(tried("e"))).id == "e"

    async def test_a_retry_whose_first_try_never_came_makes_the_job(self, queue: JobQueue) -> None:
        assert (await queue.enqueue(tried("a", is_repeat=True))).id == "a"
        assert (await queue.enqueue(tried("b", is_repeat=True))).id == "a"

    async def test_a_first_try_that_its_retry_overtook_takes_the_retrys_job(
        self, queue: JobQueue
    ) -> None:
        await queue.enqueue(tried("retry", is_repeat=True))
        assert (await queue.enqueue(tried("late", age_seconds=5))).id == "retry"
        await asyncio.sleep(0.01)
        assert (await queue.enqueue(tried("again"))).id == "again"
        assert (await queue.enqueue(tried("slow", age_seconds=5))).id == "slow"


class TestLease:
    async def test_heartbeat_keeps_the_job(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue, "a", LEASE)
        until = time.monotonic() + 3 * LEASE
        while time.monotonic() < until:
            await queue.heartbeat(claim, LEASE)
            assert await queue.claim(TUNE, "b", LEASE) is None
            await queue.wait(TUNE, LEASE / 4)
        assert (await queue.settle(claim, JobStatus.SUCCEEDED)).attempt == 1

    async def test_lease_that_ran_out_may_be_renewed_until_it_is_taken(
        self, queue: JobQueue
    ) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue, "a", LEASE)
        await lease_ends()
        await queue.heartbeat(claim, LONG)
        assert await queue.claim(TUNE, "b", LONG) is None

    async def test_job_of_a_dead_worker_goes_to_its_old_place(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        await queue.enqueue(new_job("k"))
        await next_claim(queue, "a", LEASE)
        await lease_ends()
        claim = await next_claim(queue, "b")
        assert (claim.job.id, claim.attempt, claim.job.worker) == ("j", 2, "b")
        events = await queue.events("acme", "j")
        assert [event.type for event in events] == ["queued", "started", "job_restarted", "started"]
        assert events[2].level == "warn"
        assert events[2].data == {"attempt": 1, "from_step": 0, "reason": "worker_lost"}

    async def test_last_attempt_lost_fails_the_job_and_its_waiters(self, backend: Backend) -> None:
        queue = backend.make(max_attempts=2)
        await queue.enqueue(new_job("j"))
        await queue.enqueue(new_job("k", after=("j",)))
        assert [(await next_claim(queue, "a", LEASE)).attempt for _ in range(2)] == [1, 2]
        await lease_ends()
        assert await queue.claim(TUNE, "b", LEASE) is None
        for id in ("j", "k"):
            job = await queue.get("acme", id)
            assert job is not None
            assert job.status is JobStatus.FAILED
            assert job.error is not None
            assert job.error.code == "worker_lost"

    async def test_lost_job_whose_cancel_was_requested_is_cancelled(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        await next_claim(queue, "a", LEASE)
        await queue.cancel("acme", "j")
        await lease_ends()
        assert await queue.claim(TUNE, "b", LEASE) is None
        assert await status(queue, "j") is JobStatus.CANCELLED

    async def test_attempts_only_grow(self, backend: Backend) -> None:
        queue = backend.make(max_attempts=10)
        await queue.enqueue(new_job("j"))
        seen = []
        for _ in range(3):
            lost = await next_claim(queue, "a", LEASE / 3)
            given_back = await next_claim(queue, "a")
            await queue.retry(given_back, 0, CRASH)
            seen += [lost.attempt, given_back.attempt]
        assert seen == [1, 2, 3, 4, 5, 6]


WRITES: dict[str, Callable[[JobQueue, Claim], Awaitable[object]]] = {
    "heartbeat": lambda queue, claim: queue.heartbeat(claim, LONG),
    "append_event": lambda queue, claim: queue.append_event(claim, "step", "late"),
    "announce": lambda queue, claim: queue.announce(
        claim, Change(tenant="acme", model="m", type="published", version=1), {}
    ),
    "mark_publishing": lambda queue, claim: queue.mark_publishing(claim, LONG),
    "clear_publishing": lambda queue, claim: queue.clear_publishing(claim),
    "settle": lambda queue, claim: queue.settle(claim, JobStatus.SUCCEEDED),
    "retry": lambda queue, claim: queue.retry(claim, 0, CRASH),
    "release": lambda queue, claim: queue.release(claim),
}


@pytest.mark.parametrize("write", WRITES)
class TestFence:
    async def test_refuses_a_worker_whose_job_another_has(
        self, backend: Backend, write: str
    ) -> None:
        queue = backend.make()
        old, new = await taken_over(queue)
        await self._refused(backend, queue, write, old, new)

    async def test_refuses_an_older_attempt_of_the_same_worker(
        self, backend: Backend, write: str
    ) -> None:
        queue = backend.make()
        old, new = await taken_over(queue, "a", "a")
        await self._refused(backend, queue, write, old, new)

    async def test_refuses_a_worker_that_has_the_attempt_of_another(
        self, backend: Backend, write: str
    ) -> None:
        queue = backend.make()
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue, "a")
        await self._refused(backend, queue, write, Claim(claim.job, "b"), claim)

    async def test_refuses_after_the_end(self, backend: Backend, write: str) -> None:
        queue = backend.make()
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue, "a")
        await queue.settle(claim, JobStatus.SUCCEEDED, result={"n": 1})
        await self._refused(backend, queue, write, claim, None)

    async def _refused(
        self, backend: Backend, queue: JobQueue, write: str, old: Claim, current: Claim | None
    ) -> None:
        cursor, _ = await backend.feed.follow(None, 0)
        before = await queue.get("acme", "j"), await queue.events("acme", "j")
        with pytest.raises(LeaseLost):
            await WRITES[write](queue, old)
        assert (await queue.get("acme", "j"), await queue.events("acme", "j")) == before
        assert await backend.feed.follow(cursor, 0) == (cursor, [])
        if current:
            await queue.settle(current, JobStatus.SUCCEEDED)


class TestEnd:
    async def test_failure_is_kept_and_told(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        done = await queue.settle(await next_claim(queue), JobStatus.FAILED, error=BAD_DATA)
        assert (done.status, done.error) == (JobStatus.FAILED, BAD_DATA)
        (event,) = await queue.events("acme", "j", newest_first=True, limit=1)
        assert (event.type, event.level, event.message) == ("failed", "error", BAD_DATA.message)
        assert event.data == {"code": "data_error"}

    async def test_settlement_must_make_sense(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue)
        with pytest.raises(ValueError, match="terminal"):
            await queue.settle(claim, JobStatus.QUEUED)
        with pytest.raises(ValueError, match="error"):
            await queue.settle(claim, JobStatus.FAILED)
        with pytest.raises(ValueError, match="error"):
            await queue.settle(claim, JobStatus.SUCCEEDED, error=CRASH)
        assert await status(queue, "j") is JobStatus.RUNNING

    async def test_retry_runs_again_after_the_delay(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        first = await next_claim(queue, "a")
        assert await queue.claim(TUNE, "b", LONG) is None
        given_back = await queue.retry(first, 0.3, CRASH)
        at = time.monotonic()
        assert (given_back.status, given_back.worker) == (JobStatus.QUEUED, None)
        assert await queue.position(given_back) is None
        second = await next_claim(queue, "b")
        assert 0.25 < time.monotonic() - at < 0.3 + PROMPT
        assert second.attempt == 2
        assert second.job.started_at == first.job.started_at
        retrying = (await queue.events("acme", "j"))[2]
        assert (retrying.type, retrying.level) == ("retrying", "warn")
        assert retrying.data == {"attempt": 1, "delay_seconds": 0.3, "reason": CRASH.message}

    async def test_retry_without_attempts_left_fails_with_its_failure(
        self, backend: Backend
    ) -> None:
        queue = backend.make(max_attempts=1)
        await queue.enqueue(new_job("j"))
        ended = await queue.retry(await next_claim(queue), 0, CRASH)
        assert (ended.status, ended.error) == (JobStatus.FAILED, CRASH)

    async def test_retry_of_a_job_to_be_cancelled_cancels_it(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue)
        await queue.cancel("acme", "j")
        assert (await queue.retry(claim, 0, CRASH)).status is JobStatus.CANCELLED


class TestArchive:
    async def test_every_end_of_a_job_is_there_until_it_is_marked(self, backend: Backend) -> None:
        queue = backend.make(max_attempts=1)
        await queue.enqueue(new_job("file", kind=JobKind.INGEST))
        await queue.enqueue(new_job("failed-by-file", after=("file",)))
        await queue.enqueue(new_job("cancelled"))
        await queue.cancel("acme", "cancelled")
        await queue.enqueue(new_job("lost", "bolt"))
        await next_claim(queue, "a", LEASE)
        await lease_ends()
        assert await queue.claim(TUNE, "b", LONG) is None
        for id, ending in (("succeeded", "settle"), ("retried", "retry")):
            await queue.enqueue(new_job(id))
            claim = await next_claim(queue)
            assert id not in [job.id for job in await queue.unarchived()]
            await WRITES[ending](queue, claim)
        ingest = await queue.claim(JobKind.INGEST, "w", LONG)
        assert ingest is not None
        await queue.settle(ingest, JobStatus.FAILED, error=BAD_DATA)

        parsed = new_job("parsed", kind=JobKind.INGEST)
        await queue.enqueue(parsed)
        ingest = await queue.claim(JobKind.INGEST, "w", LONG)
        assert ingest is not None
        await queue.settle(ingest, JobStatus.SUCCEEDED, result={})

        found = await queue.unarchived()
        assert [(job.tenant, job.id) for job in found[:4]] == [
            ("acme", "cancelled"), ("bolt", "lost"), ("acme", "succeeded"), ("acme", "retried"),
        ]  # fmt: skip
        # These two ended at the same moment.
        assert {job.id for job in found[4:]} == {"file", "failed-by-file"}
        assert all(job.status.is_terminal for job in found)
        assert found[2] == await queue.get("acme", "succeeded")
        assert await queue.unarchived(limit=2) == found[:2]
        await queue.mark_archived(found[0])
        await queue.mark_archived(found[0])
        assert await queue.unarchived() == found[1:]

    async def test_is_not_forgotten_before_it_is_marked(self, backend: Backend) -> None:
        queue = backend.make(retention_seconds=1)
        await queue.enqueue(new_job("j"))
        await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED)
        await asyncio.sleep(1.1)  # time itself is what is waited for
        (job,) = await queue.unarchived()
        assert await queue.get("acme", "j") == job
        assert (await types(queue, "j"))[-1] == "succeeded"

    async def test_unknown_jobs_are_passed_over(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        running = (await next_claim(queue)).job
        await queue.mark_archived(running)
        await queue.mark_archived(running.model_copy(update={"id": "gone"}))
        assert await queue.get("acme", "j") == running


class TestRelease:
    async def test_job_goes_to_its_old_place_at_once(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        await queue.enqueue(new_job("k"))
        given_back = await queue.release(await next_claim(queue, "a"))
        assert (given_back.status, given_back.worker) == (JobStatus.QUEUED, None)
        assert await queue.position(given_back) == 0
        claim = await next_claim(queue, "b")
        assert (claim.job.id, claim.attempt) == ("j", 2)
        restarted = (await queue.events("acme", "j"))[2]
        assert (restarted.type, restarted.level) == ("job_restarted", "info")
        assert restarted.data == {"attempt": 1, "from_step": 0, "reason": "worker_stopped"}

    async def test_uses_up_no_attempt(self, backend: Backend) -> None:
        queue = backend.make(max_attempts=2)
        await queue.enqueue(new_job("j"))
        for attempt in range(1, 5):
            claim = await next_claim(queue)
            assert claim.attempt == attempt
            await queue.release(claim)
        assert (await queue.retry(await next_claim(queue), 0, CRASH)).status is JobStatus.QUEUED
        await queue.release(await next_claim(queue))
        ended = await queue.retry(await next_claim(queue), 0, CRASH)
        assert (ended.status, ended.error, ended.attempt) == (JobStatus.FAILED, CRASH, 7)

    async def test_lost_workers_still_use_attempts_up(self, backend: Backend) -> None:
        queue = backend.make(max_attempts=2)
        await queue.enqueue(new_job("j"))
        await queue.release(await next_claim(queue))
        for attempt in (2, 3):
            assert (await next_claim(queue, "a", LEASE)).attempt == attempt
        await lease_ends()
        assert await queue.claim(TUNE, "b", LEASE) is None
        job = await queue.get("acme", "j")
        assert job is not None
        assert job.error is not None
        assert job.error.message == "The worker was lost in each of 2 attempts."

    async def test_wakes_who_waits(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue)
        assert await queue.claim(TUNE, "b", LONG) is None
        waiting = asyncio.create_task(queue.wait(TUNE, DEADLINE))
        await queue.release(claim)
        await asyncio.wait_for(waiting, PROMPT)

    async def test_job_to_be_cancelled_is_cancelled(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue)
        await queue.cancel("acme", "j")
        assert (await queue.release(claim)).status is JobStatus.CANCELLED


class TestCancel:
    async def test_queued_validating_and_delayed_jobs_end_at_once(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("delayed"))
        await queue.retry(await next_claim(queue), 0.05, CRASH)
        await queue.enqueue(new_job("queued"))
        await queue.enqueue(new_job("validating", after=("queued",)))
        for id in ("validating", "queued", "delayed"):
            job = await queue.cancel("acme", id)
            assert job.status is JobStatus.CANCELLED
            assert job.finished_at is not None
            assert (await types(queue, id))[-1] == "cancelled"
            with pytest.raises(Conflict):
                await queue.cancel("acme", id)
        await queue.wait(TUNE, 0.1)
        await queue.wait(TUNE, 0.1)
        assert await queue.claim(TUNE, "w", LONG) is None

    async def test_running_job_is_asked_to_stop_once(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue)
        for _ in range(2):
            job = await queue.cancel("acme", "j")
            assert (job.status, job.cancel_requested) == (JobStatus.RUNNING, True)
        assert await queue.heartbeat(claim, LONG) is StopReason.CANCEL
        await queue.settle(claim, JobStatus.CANCELLED)
        assert await types(queue, "j") == ["queued", "started", "cancel_requested", "cancelled"]

    async def test_unknown_and_ended_jobs(self, queue: JobQueue) -> None:
        with pytest.raises(NotFound):
            await queue.cancel("acme", "gone")
        await queue.enqueue(new_job("j"))
        await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED)
        with pytest.raises(Conflict):
            await queue.cancel("acme", "j")


class TestAfter:
    async def test_unknown_job_is_refused(self, queue: JobQueue) -> None:
        with pytest.raises(NotFound) as refusal:
            await queue.enqueue(new_job("j", after=("gone",)))
        assert refusal.value.param == "after"
        assert await queue.get("acme", "j") is None

    async def test_waits_for_the_last_of_two(self, queue: JobQueue) -> None:
        ingest = JobKind.INGEST
        await queue.enqueue(new_job("f1", kind=ingest))
        await queue.enqueue(new_job("f2", kind=ingest))
        job = await queue.enqueue(new_job("j", after=("f1", "f2", "f1")))
        assert job.status is JobStatus.VALIDATING_FILES
        for left in (True, False):
            assert await queue.claim(TUNE, "w", LONG) is None
            claim = await queue.claim(ingest, "w", LONG)
            assert claim is not None
            await queue.settle(claim, JobStatus.SUCCEEDED)
            waits = await status(queue, "j") is JobStatus.VALIDATING_FILES
            assert waits is left
        assert (await next_claim(queue)).job.id == "j"
        assert await types(queue, "j") == ["validated", "queued", "started"]

    async def test_job_that_succeeded_before_is_not_waited_for(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("f"))
        await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED)
        job = await queue.enqueue(new_job("j", after=("f",)))
        assert job.status is JobStatus.QUEUED
        assert await types(queue, "j") == ["validated", "queued"]

    @pytest.mark.parametrize("before", [True, False])
    async def test_failure_is_inherited_along_the_chain(
        self, queue: JobQueue, before: bool
    ) -> None:
        await queue.enqueue(new_job("f"))
        claim = await next_claim(queue)
        chain = [("j", "f"), ("k", "j"), ("l", "k")]
        if not before:
            for id, first in chain:
                await queue.enqueue(new_job(id, after=(first,)))
        await queue.settle(claim, JobStatus.FAILED, error=BAD_DATA)
        for id, first in chain:
            job = await queue.enqueue(new_job(id, after=(first,)))
            assert (job.status, job.error) == (JobStatus.FAILED, BAD_DATA)
            assert await types(queue, id) == ["failed"]

    @pytest.mark.parametrize("before", [True, False])
    async def test_cancelled_file_fails_the_job(self, queue: JobQueue, before: bool) -> None:
        await queue.enqueue(new_job("f"))
        if before:
            await queue.cancel("acme", "f")
        await queue.enqueue(new_job("j", after=("f",)))
        if not before:
            await queue.cancel("acme", "f")
        job = await queue.get("acme", "j")
        assert job is not None
        assert job.status is JobStatus.FAILED
        assert job.error is not None
        assert job.error.code == "data_error"
        assert "cancelled" in job.error.message

    async def test_cancelled_waiter_stays_cancelled(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("f"))
        await queue.enqueue(new_job("j", after=("f",)))
        await queue.cancel("acme", "j")
        await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED)
        assert await status(queue, "j") is JobStatus.CANCELLED
        assert await queue.claim(TUNE, "w", LONG) is None


class TestEvents:
    async def test_pages_in_both_directions(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue)
        for n in range(5):
            await queue.append_event(claim, "step", f"step {n}", level="warn", data={"n": n})
        for newest_first in (False, True):
            seen, after = [], None
            for length in (3, 3, 1):
                page = await queue.events(
                    "acme", "j", after=after, limit=3, newest_first=newest_first
                )
                assert len(page) == length
                seen += page
                after = page[-1].id
            expected = ["queued", "started", *(f"step {n}" for n in range(5))]
            found = [e.message if e.type == "step" else e.type for e in seen]
            assert found == (expected[::-1] if newest_first else expected)
            assert len({event.id for event in seen}) == 7

    async def test_appended_event_is_the_one_read(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue)
        event = await queue.append_event(claim, "epoch", "1 of 3", data={"loss": 0.5})
        assert [event] == await queue.events("acme", "j", newest_first=True, limit=1)
        assert abs(event.created_at - time.time()) < 60
        with pytest.raises(ValueError, match="level"):
            await queue.append_event(claim, "epoch", "2 of 3", level="loud")
        assert [event] == await queue.events("acme", "j", newest_first=True, limit=1)

    @pytest.mark.parametrize("cursor", ["x", "1", "1-2-3", "-", "+", "(1-1", "9" * 30 + "-1"])
    async def test_cursor_must_be_an_id(self, queue: JobQueue, cursor: str) -> None:
        with pytest.raises(InvalidRequest):
            await queue.events("acme", "j", after=cursor)
        with pytest.raises(InvalidRequest):
            await queue.wait_events("acme", "j", cursor, 0)

    async def test_wait_events_wakes_for_the_next_and_for_the_end(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        (queued,) = await queue.wait_events("acme", "j", None, 0)
        after = queued.id
        claim: Claim | None = None
        for type in ("started", "step", "succeeded"):
            waiting = asyncio.create_task(queue.wait_events("acme", "j", after, DEADLINE))
            await queue.wait_events("acme", "j", after, 0.02)
            assert not waiting.done()
            if claim is None:
                claim = await next_claim(queue)
            elif type == "step":
                await queue.append_event(claim, "step", "worked")
            else:
                await queue.settle(claim, JobStatus.SUCCEEDED)
            (event,) = await asyncio.wait_for(waiting, PROMPT)
            assert event.type == type
            after = event.id
        assert await queue.wait_events("acme", "j", after, 0.01) == []


class TestWait:
    async def test_wakes_promptly(self, queue: JobQueue) -> None:
        assert await queue.claim(TUNE, "w", LONG) is None
        waiting = asyncio.create_task(queue.wait(TUNE, DEADLINE))
        await queue.wait(TUNE, 0.02)
        assert not waiting.done()
        await queue.enqueue(new_job("j"))
        await asyncio.wait_for(waiting, PROMPT)

    async def test_job_between_claim_and_wait_is_not_missed(self, queue: JobQueue) -> None:
        for n in range(3):
            assert await queue.claim(TUNE, "w", LONG) is None
            await queue.enqueue(new_job(f"j{n}"))
            await asyncio.wait_for(queue.wait(TUNE, DEADLINE), PROMPT)
            assert await queue.claim(TUNE, "w", LONG) is not None

    async def test_freed_waiter_wakes_a_worker(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("f", kind=JobKind.INGEST))
        await queue.enqueue(new_job("j", after=("f",)))
        assert await queue.claim(TUNE, "w", LONG) is None
        ingest = await queue.claim(JobKind.INGEST, "w", LONG)
        assert ingest is not None
        await queue.settle(ingest, JobStatus.SUCCEEDED)
        await asyncio.wait_for(queue.wait(TUNE, DEADLINE), PROMPT)

    async def test_delay_that_ends_wakes_who_waits_already(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        claim = await next_claim(queue)
        assert await queue.claim(TUNE, "b", LONG) is None
        waiting = asyncio.create_task(next_claim(queue, "b"))
        await queue.wait(TUNE, 0.05)
        await queue.retry(claim, 0.1, CRASH)
        assert (await asyncio.wait_for(waiting, PROMPT)).attempt == 2

    async def test_returns_after_the_timeout(self, queue: JobQueue) -> None:
        assert await queue.claim(TUNE, "w", LONG) is None
        started = time.monotonic()
        await queue.wait(TUNE, 0.1)
        assert 0.09 < time.monotonic() - started < 0.1 + PROMPT


class TestChanges:
    async def test_announced_and_published_changes_reach_a_follower(self, backend: Backend) -> None:
        queue, feed = backend.make(), backend.feed
        cursor, changes = await feed.follow(None, DEADLINE)
        assert changes == []
        published = Change(tenant="acme", model="m", type="published", version=3)
        released = Change(tenant="acme", model="m", type="released")

        following = asyncio.create_task(feed.follow(cursor, DEADLINE))
        await feed.follow(cursor, 0.02)
        assert not following.done()
        await queue.enqueue(new_job("j"))
        await queue.announce(await next_claim(queue), published, {})
        cursor, changes = await asyncio.wait_for(following, PROMPT)
        assert changes == [published]

        await feed.publish(released)
        await feed.publish(published)
        end, changes = await feed.follow(cursor, DEADLINE)
        assert changes == [released, published]
        assert await feed.follow(end, 0.01) == (end, [])
        assert await feed.follow(None, 0) == (end, [])
