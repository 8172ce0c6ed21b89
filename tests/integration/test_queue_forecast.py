"""The contract of `JobQueue` for what forecasts are made from."""

from __future__ import annotations

import pytest

from core.jobs import JobKind, JobStatus
from core.outlook import Estimate, Line, Progress, Running
from core.queue import JobQueue
from core.queue.redis_views import OUTLOOK_JOBS
from tests.integration.test_queue_contract import (
    BAD_DATA,
    LONG,
    TUNE,
    backend,
    new_job,
    next_claim,
    queue,
)

__all__ = ["backend", "queue"]

pytestmark = pytest.mark.anyio


def of_size(seconds: float, pace: str = "minilm") -> Estimate:
    return Estimate(pace=pace, stages={"fit": seconds / 4, "features": seconds * 3 / 4})


class TestOutlook:
    async def test_tells_what_runs_and_what_waits_in_the_order_of_turns(
        self, queue: JobQueue
    ) -> None:
        sizes = {"low": 1.0, "first": 2.0, "second": 3.0, "unknown": None}
        for id, seconds in sizes.items():
            estimate = None if seconds is None else of_size(seconds)
            priority = -1 if id == "low" else 0
            await queue.enqueue(new_job(id, estimate=estimate, priority=priority))
        await queue.enqueue(new_job("b", "bolt", estimate=of_size(9.0)))
        claim = await next_claim(queue)
        progress = Progress(stage="fit", fraction=0.62)
        await queue.heartbeat(claim, LONG, progress)
        outlook = await queue.outlook(TUNE)
        told = Running(
            id="first", claimed_at=claim.job.claimed_at or 0, estimate=of_size(2.0),
            progress=progress,
        )  # fmt: skip
        assert outlook.running == (told,)
        assert outlook.now >= told.claimed_at
        # acme has had its turn.
        assert list(outlook.pending) == ["bolt", "acme"]
        assert outlook.pending["acme"] == Line(
            count=3, first=(of_size(3.0), None, of_size(1.0))
        )  # fmt: skip

    async def test_tells_of_so_many_of_a_long_line(self, queue: JobQueue) -> None:
        for n in range(OUTLOOK_JOBS // 2 + 10):
            await queue.enqueue(new_job(f"j{n}", estimate=of_size(n + 1.0)))
        await queue.enqueue(new_job("b", "bolt"))
        line = (await queue.outlook(TUNE)).pending["acme"]
        assert (line.count, len(line.first)) == (OUTLOOK_JOBS // 2 + 10, OUTLOOK_JOBS // 2)
        assert line.first[-1] == of_size(OUTLOOK_JOBS // 2)

    async def test_learns_how_far_estimates_are_off_and_older_jobs_weigh_less(
        self, queue: JobQueue
    ) -> None:
        for n, (expected, took) in enumerate(((10.0, 20.0), (30.0, 15.0))):
            await queue.enqueue(new_job(f"j{n}", estimate=of_size(expected)))
            await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED, seconds=took)
        await queue.enqueue(new_job("other", estimate=of_size(1.0, "hf:other model")))
        await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED, seconds=7.0)
        ratios = (await queue.outlook(TUNE)).ratios
        weighed = (0.8 * 20 + 15) / (0.8 * 10 + 30)
        assert ratios == pytest.approx({"minilm": weighed, "hf:other model": 7.0})

    async def test_learns_only_from_whole_attempts_that_succeed(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("unmeasured", estimate=of_size(1.0)))
        await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED)
        await queue.enqueue(new_job("unexpected"))
        await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED, seconds=1.0)
        await queue.enqueue(new_job("failed", estimate=of_size(1.0)))
        failed = await next_claim(queue)
        await queue.settle(failed, JobStatus.FAILED, error=BAD_DATA, seconds=1.0)
        await queue.enqueue(new_job("resumed", estimate=of_size(1.0)))
        await queue.release(await next_claim(queue))
        await queue.settle(await next_claim(queue), JobStatus.SUCCEEDED, seconds=1.0)
        assert (await queue.outlook(TUNE)).ratios == {}


class TestEstimates:
    async def test_a_file_that_was_parsed_tells_of_the_jobs_that_wait_for_it(
        self, queue: JobQueue
    ) -> None:
        file = await queue.enqueue(new_job("file", kind=JobKind.INGEST))
        for id in ("a", "b", "gone"):
            await queue.enqueue(new_job(id, after=("file",)))
        await queue.enqueue(new_job("known", after=("file",), estimate=of_size(1.0)))
        await queue.enqueue(new_job("free"))
        await queue.cancel("acme", "gone")
        waiters = await queue.waiters(file)
        assert sorted(job.id for job in waiters) == ["a", "b"]
        assert len(await queue.waiters(file, limit=1)) == 1
        for job in waiters:
            await queue.note_estimate("acme", job.id, of_size(5.0))
        assert await queue.waiters(file) == []
        found = await queue.get("acme", "a")
        assert found is not None
        assert (found.estimate, found.status) == (of_size(5.0), JobStatus.VALIDATING_FILES)

    async def test_what_has_ended_or_is_unknown_is_left_alone(self, queue: JobQueue) -> None:
        await queue.enqueue(new_job("ended"))
        await queue.cancel("acme", "ended")
        for id in ("ended", "never"):
            await queue.note_estimate("acme", id, of_size(5.0))
        ended = await queue.get("acme", "ended")
        assert ended is not None
        assert ended.estimate is None
        assert await queue.get("acme", "never") is None
