"""The contract of `JobQueue` for jobs that are paused, publish, or are held back by a cap."""

from __future__ import annotations

import pytest

from core.changes import Change
from core.errors import Conflict, NotFound
from core.jobs import JobKind, JobStatus, StopReason
from core.queue import Claim, JobQueue
from tests.integration.test_queue_contract import (
    BAD_DATA,
    CRASH,
    LEASE,
    LONG,
    TUNE,
    Backend,
    backend,
    lease_ends,
    new_job,
    next_claim,
    queue,
    status,
    types,
)

__all__ = ["backend", "queue"]

pytestmark = pytest.mark.anyio
RESULT = {"fine_tuned_model": "m@1"}


async def running(queue: JobQueue, lease_seconds: float = LONG) -> Claim:
    await queue.enqueue(new_job("j"))
    return await next_claim(queue, lease_seconds=lease_seconds)


class TestPause:
    async def test_waiting_job_goes_aside_and_back_to_its_old_place(self, queue: JobQueue) -> None:
        for id in "abc":
            await queue.enqueue(new_job(id))
        job = await queue.pause("acme", "a")
        assert (job.status, await queue.position(job)) == (JobStatus.PAUSED, None)
        assert await queue.pause("acme", "a") == job
        assert (await next_claim(queue)).job.id == "b"
        job = await queue.resume("acme", "a")
        assert (job.status, await queue.position(job)) == (JobStatus.QUEUED, 0)
        assert (await next_claim(queue)).job.id == "a"
        assert await types(queue, "a") == ["queued", "paused", "resumed", "started"]

    async def test_the_only_job_of_a_line(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        await queue.pause("acme", "j")
        assert await queue.claim(TUNE, "w", LONG) is None
        await queue.resume("acme", "j")
        assert (await next_claim(queue)).attempt == 1

    async def test_running_job_is_asked_and_uses_up_no_attempt(self, backend: Backend) -> None:
        queue = backend.make(max_attempts=1)
        claim = await running(queue)
        for _ in range(2):
            job = await queue.pause("acme", "j")
            assert (job.status, job.pause_requested) == (JobStatus.RUNNING, True)
        assert await queue.heartbeat(claim, LONG) is StopReason.PAUSE
        with pytest.raises(Conflict, match="still being paused"):
            await queue.resume("acme", "j")
        job = await queue.release(claim)
        assert (job.status, job.pause_requested, job.worker) == (JobStatus.PAUSED, False, None)
        await queue.resume("acme", "j")
        claim = await next_claim(queue)
        assert claim.attempt == 2
        assert await queue.heartbeat(claim, LONG) is None
        await queue.settle(claim, JobStatus.SUCCEEDED)
        assert await types(queue, "j") == [
            "queued", "started", "pause_requested", "paused", "resumed", "started", "succeeded",
        ]  # fmt: skip

    async def test_cancel_goes_before_pause(self, queue: JobQueue) -> None:
        claim = await running(queue)
        await queue.pause("acme", "j")
        await queue.cancel("acme", "j")
        assert await queue.heartbeat(claim, LONG) is StopReason.CANCEL
        with pytest.raises(Conflict, match="being cancelled"):
            await queue.pause("acme", "j")
        assert (await queue.release(claim)).status is JobStatus.CANCELLED

    async def test_paused_job_is_cancelled_at_once(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("j"))
        await queue.pause("acme", "j")
        job = await queue.cancel("acme", "j", keep_best=True)
        assert (job.status, job.keep_best) == (JobStatus.CANCELLED, True)
        for ask in (queue.pause, queue.resume):
            with pytest.raises(Conflict):
                await ask("acme", "j")

    async def test_delayed_job_stays_aside_when_its_delay_ends(self, queue: JobQueue) -> None:
        await queue.retry(await running(queue), 0.01, CRASH)
        await queue.pause("acme", "j")
        await lease_ends()
        assert await queue.claim(TUNE, "w", LONG) is None
        assert await status(queue, "j") is JobStatus.PAUSED

    async def test_lost_worker_of_a_job_that_was_to_pause(self, queue: JobQueue) -> None:
        await running(queue, LEASE)
        await queue.pause("acme", "j")
        await lease_ends()
        assert await queue.claim(TUNE, "w", LONG) is None
        assert await status(queue, "j") is JobStatus.PAUSED

    async def test_job_whose_files_are_validated_meanwhile(self, queue: JobQueue) -> None:
        ingest = JobKind.INGEST
        for file, job in (("f1", "early"), ("f2", "late"), ("f3", "bad")):
            await queue.enqueue(new_job(file, kind=ingest))
            await queue.enqueue(new_job(job, after=(file,)))
            await queue.pause("acme", job)
        assert (await queue.resume("acme", "early")).status is JobStatus.VALIDATING_FILES
        for error in (None, None, BAD_DATA):
            claim = await queue.claim(ingest, "w", LONG)
            assert claim is not None
            await queue.settle(
                claim, JobStatus.FAILED if error else JobStatus.SUCCEEDED, error=error
            )
        assert await status(queue, "early") is JobStatus.QUEUED
        assert await status(queue, "late") is JobStatus.PAUSED
        # There is nothing to resume once its file is known to be unusable.
        assert await status(queue, "bad") is JobStatus.FAILED
        assert (await queue.resume("acme", "late")).status is JobStatus.QUEUED
        assert await types(queue, "late") == ["paused", "validated", "resumed"]

    async def test_paused_job_counts_as_unfinished(self, backend: Backend) -> None:
        queue = backend.make(max_queued=1)
        await queue.enqueue(new_job("j"))
        await queue.pause("acme", "j")
        with pytest.raises(Exception, match="unfinished"):
            await queue.enqueue(new_job("k"))

    async def test_unknown_and_other_jobs(self, queue: JobQueue) -> None:
        for ask in (queue.pause, queue.resume):
            with pytest.raises(NotFound):
                await ask("acme", "gone")
        await queue.enqueue(new_job("j"))
        with pytest.raises(Conflict, match="not paused"):
            await queue.resume("acme", "j")


class TestPublishing:
    @pytest.mark.parametrize("wish", [StopReason.CANCEL, StopReason.PAUSE])
    async def test_is_not_begun_when_something_else_is_wanted(
        self, queue: JobQueue, wish: StopReason
    ) -> None:
        claim = await running(queue)
        await (queue.cancel if wish is StopReason.CANCEL else queue.pause)("acme", "j")
        assert await queue.mark_publishing(claim, LONG) is wish
        assert await queue.heartbeat(claim, LONG) is wish

    async def test_cancel_is_put_off_and_pause_refused(self, queue: JobQueue) -> None:
        claim = await running(queue)
        assert await queue.mark_publishing(claim, LONG) is None
        assert (await queue.cancel("acme", "j")).cancel_requested
        assert await queue.heartbeat(claim, LONG) is None
        assert (await queue.clear_publishing(claim)).status is JobStatus.CANCELLED
        claim = await self._publishing(queue, "k")
        with pytest.raises(Conflict, match="publishing"):
            await queue.pause("acme", "k")

    async def _publishing(
        self, queue: JobQueue, id: str = "j", lease_seconds: float = LONG
    ) -> Claim:
        await queue.enqueue(new_job(id))
        claim = await next_claim(queue, lease_seconds=lease_seconds)
        await queue.mark_publishing(claim, lease_seconds)
        return claim

    async def test_lost_attempts_bring_it_back_until_somebody_looks(self, backend: Backend) -> None:
        queue = backend.make(max_attempts=1)
        await self._publishing(queue, lease_seconds=LEASE)
        await queue.cancel("acme", "j")
        await lease_ends()
        claim = await next_claim(queue)
        assert (claim.attempt, claim.job.publishing) == (2, True)
        await queue.retry(claim, 0, CRASH)
        claim = await next_claim(queue)
        assert claim.attempt == 3
        # A cancel that was asked for goes before the attempts that are used up.
        assert (await queue.clear_publishing(claim)).status is JobStatus.CANCELLED

    async def test_attempts_that_were_used_up_count_when_it_had_not_published(
        self, backend: Backend
    ) -> None:
        queue = backend.make(max_attempts=1)
        await queue.retry(await self._publishing(queue), 0, CRASH)
        job = await queue.clear_publishing(await next_claim(queue))
        assert (job.status, job.error) == (JobStatus.FAILED, CRASH)

    async def test_clear_lets_it_go_on(self, queue: JobQueue) -> None:
        claim = await self._publishing(queue)
        job = await queue.clear_publishing(claim)
        assert (job.status, job.publishing) == (JobStatus.RUNNING, False)
        await queue.heartbeat(claim, LONG)

    async def test_one_that_kills_all_who_publish_it_ends(self, backend: Backend) -> None:
        queue = backend.make(max_attempts=1)
        await queue.enqueue(new_job("j"))
        while True:
            claim = await next_claim(queue)
            await queue.mark_publishing(claim, LONG)
            job = await queue.retry(claim, 0, CRASH)
            if job.status.is_terminal:
                break
        assert (job.status, job.error) == (JobStatus.FAILED, CRASH)
        assert claim.attempt == 21

    async def test_what_was_announced_is_told_by_whoever_comes_next(self, backend: Backend) -> None:
        queue = backend.make(max_attempts=1)
        claim = await self._publishing(queue, lease_seconds=LEASE)
        change = Change(tenant="acme", model="m", type="published", version=1)
        await queue.announce(claim, change, RESULT)
        await queue.cancel("acme", "j")
        await lease_ends()
        assert await queue.claim(TUNE, "w", LONG) is None
        job = await queue.get("acme", "j")
        assert job is not None
        assert (job.status, job.result, job.publishing) == (JobStatus.SUCCEEDED, RESULT, False)


class TestCap:
    async def test_tenant_at_its_cap_lets_others_go_first(self, backend: Backend) -> None:
        queue = backend.make(max_running=2)
        for n in range(4):
            await queue.enqueue(new_job(f"a{n}"))
        for n in range(2):
            await queue.enqueue(new_job(f"b{n}", "bolt"))
        claims = [await next_claim(queue) for _ in range(4)]
        assert [claim.job.id for claim in claims] == ["a0", "b0", "a1", "b1"]
        assert await queue.claim(TUNE, "w", LONG) is None
        await queue.settle(claims[3], JobStatus.SUCCEEDED)
        assert await queue.claim(TUNE, "w", LONG) is None
        await queue.pause("acme", "a0")
        await queue.release(claims[0])
        # A worker that waits is woken, though nothing was added to the line.
        assert (await next_claim(queue)).job.id == "a2"
        assert await queue.claim(TUNE, "w", LONG) is None

    async def test_lost_job_makes_room(self, backend: Backend) -> None:
        queue = backend.make(max_running=1)
        for id in "ab":
            await queue.enqueue(new_job(id))
        await next_claim(queue, lease_seconds=LEASE)
        assert await queue.claim(TUNE, "w", LONG) is None
        await lease_ends()
        assert (await next_claim(queue)).job.id == "a"

    async def test_kinds_have_caps_of_their_own(self, backend: Backend) -> None:
        queue = backend.make(max_running=1)
        await running(queue)
        await queue.enqueue(new_job("f", kind=JobKind.INGEST))
        assert await queue.claim(JobKind.INGEST, "w", LONG) is not None


class TestCheckpoints:
    async def test_restart_says_which_step_it_goes_on_from(self, queue: JobQueue) -> None:
        claim = await running(queue)
        for step, type in enumerate(("checkpoint", "epoch_ended", "state_saved"), start=1):
            await queue.append_event(claim, type, "saved", data={"step": step * 10})
        await queue.append_event(claim, "metrics", "measured", data={"step": 99})
        await queue.release(claim)
        event = (await queue.events("acme", "j"))[-1]
        assert event.type == "job_restarted"
        assert event.data == {"attempt": 1, "from_step": 30, "reason": "worker_stopped"}
