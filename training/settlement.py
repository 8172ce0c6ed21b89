"""How an attempt ends for Redis: each end of a job as one call, which may be made again.

Every method may raise `LeaseLost` and `Unavailable`; after the latter it may be called once more,
until it has come through. Not here: which end it is, and how often to insist (training.attempt).
"""

from __future__ import annotations

import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial

from core.changes import Change
from core.jobs import Failure, Job, JobKind, JobStatus
from core.outlook import Estimate
from core.presence import Presence
from core.queue import Claim, JobQueue
from training.acknowledgement import wait_served
from training.process import SucceededMessage

Decision = Callable[[], Awaitable[object]]
Expectation = Callable[[Job], Awaitable[Estimate | None]]


class Settlement:
    """The ends of one claimed job."""

    def __init__(
        self, queue: JobQueue, claim: Claim, presence: Presence, expect: Expectation
    ) -> None:
        """`expect` tells what is expected of a job whose files have been parsed."""
        self._queue = queue
        self._claim = claim
        self._presence = presence
        self._expect = expect
        self._told_serving = False

    async def succeed(self, message: SucceededMessage) -> None:
        """Tell the service processes what was published, wait for them a little, and settle."""
        model, version = message.model, message.version
        if model is not None and version is not None:
            change = Change(
                tenant=self._claim.job.tenant, model=model, type="published", version=version
            )
            await self._queue.announce(self._claim, change, message.result)
            if not self._told_serving:
                await self._tell_serving(model, version)
        if self._claim.job.kind is JobKind.INGEST:
            await self._note_estimates()
        await self._queue.settle(
            self._claim, JobStatus.SUCCEEDED, result=message.result, seconds=message.seconds
        )

    async def _note_estimates(self) -> None:
        """Of the jobs that wait for this file, before they are let into the line."""
        for waiter in await self._queue.waiters(self._claim.job):
            if (estimate := await self._expect(waiter)) is not None:
                await self._queue.note_estimate(waiter.tenant, waiter.id, estimate)

    async def _tell_serving(self, model: str, version: int) -> None:
        served = await wait_served(self._presence, self._claim.job.tenant, model, version)
        if served is not None:
            message = f"{served.acknowledged} of {served.of} service processes serve the model."
            level = "info" if served.acknowledged == served.of else "warn"
            await self._queue.append_event(
                self._claim, "serving", message, level=level, data=asdict(served)
            )
        self._told_serving = True

    async def fail(self, failure: Failure) -> None:
        """Settle a job that would fail again."""
        await self._queue.settle(self._claim, JobStatus.FAILED, error=failure)

    async def cancel(self) -> None:
        """Settle a job that was cancelled."""
        await self._queue.settle(self._claim, JobStatus.CANCELLED)

    async def retry(self, failure: Failure) -> None:
        """Give the job back, to be tried again after a while."""
        # Full jitter keeps workers that failed together from coming back together.
        delay = random.uniform(0, min(60, 2**self._claim.attempt))  # noqa: S311
        await self._queue.retry(self._claim, delay, failure)

    async def release(self) -> None:
        """Give the job back at once: to another worker, or to be paused if that was wanted."""
        await self._queue.release(self._claim)

    def of_crash(self, code: int) -> Decision:
        """Return the end of a job whose child ended without a last message.

        Who would end it with SIGKILL but the kernel?
        """
        if code == -signal.SIGKILL:
            failure = Failure(
                code="out_of_memory", message="the job was killed, most likely for want of memory"
            )
        else:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            failure = Failure(code="crashed", message=f"the job's process ended with {how}")
        if self._claim.job.kind is JobKind.INGEST:
            # The same upload would do the same again, and it holds up the others.
            return partial(self.fail, failure)
        return partial(self.retry, failure)
