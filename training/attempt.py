"""One attempt of one job: a child process under a lease.

Two loops run side by side. One renews the lease, and is where a cancel request, the time limit and
a lost lease are noticed; the other carries the child's messages to Redis. The attempt ends in one
of these ways, and the child is always gone when it does:

    the child says so       settle `succeeded` or `failed`, or give back for a retry
    the child just ends     give back for a retry, `crashed` or `out_of_memory`
    cancel was requested    stop the child, settle `cancelled`
    the time is up          kill the child, settle `failed` with `timeout`
    the lease is lost       kill the child and leave the job alone: it is someone else's
    the worker stops        stop the child and give the job back; that uses up no attempt

A worker that cannot reach Redis for a whole lease must assume that the lease is lost. Once the
child has been told to publish, a cancel request comes too late.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from core.changes import Change
from core.errors import LeaseLost, Unavailable
from core.jobs import Failure, JobKind, JobStatus, Progress
from core.queue import Claim, JobQueue
from training.process import (
    AskMessage,
    ChildProcess,
    EventMessage,
    FailedMessage,
    ProgressMessage,
    RetryMessage,
    SucceededMessage,
)

logger = logging.getLogger("graft.worker")
T = TypeVar("T")

STOP_GRACE_SECONDS = 2.0
CANCEL_POLL_SECONDS = 0.5


class Attempt:
    """Runs a claimed job in a child and settles it."""

    def __init__(
        self,
        queue: JobQueue,
        claim: Claim,
        child: ChildProcess,
        *,
        lease_seconds: float,
        max_seconds: float,
        stopping: asyncio.Event,
    ) -> None:
        self._queue = queue
        self._claim = claim
        self._child = child
        self._lease_seconds = lease_seconds
        self._deadline = time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._stopping = stopping
        self._renewed = time.monotonic()
        self._progress: Progress | None = None
        self._publishing = False
        self._ending = False

    async def run(self) -> None:
        """Run to one of the ends above; never raises for what happens to the job or to Redis."""
        relay = asyncio.create_task(self._relay())
        guard = asyncio.create_task(self._guard())
        try:
            await asyncio.wait({relay, guard}, return_when=asyncio.FIRST_COMPLETED)
            # The guard ends the child and decides; otherwise the child's last message decides.
            if guard.done() or self._ending:
                decision = await guard
            else:
                decision = relay.result() or self._crash(await self._child.wait())
            await self._insist(decision)
        except (LeaseLost, Unavailable) as error:
            logger.warning("%s: left to others: %s", self._claim.job.id, error.message)
        finally:
            self._child.kill()
            for task in (relay, guard):
                task.cancel()
            await asyncio.gather(relay, guard, return_exceptions=True)
            await self._child.wait()

    async def _relay(self) -> Callable[[], Awaitable[object]] | None:
        """Carry messages until the child's last; return what settles the job, or None."""
        await self._child.send_job(self._claim.job)
        while (message := await self._child.receive()) is not None:
            match message:
                case EventMessage():
                    await self._insist(partial(self._append, message))
                case ProgressMessage():
                    self._progress = message.progress
                case AskMessage():
                    await self._insist(self._heartbeat)
                    self._publishing = True
                    await self._child.send_go()
                case SucceededMessage():
                    return partial(self._succeed, message)
                case FailedMessage():
                    return partial(self._fail, message.failure)
                case RetryMessage():
                    return partial(self._retry, message.failure)
        return None

    async def _guard(self) -> Callable[[], Awaitable[object]]:
        """Renew the lease until something must end the child; return what settles the job."""
        interval = min(self._lease_seconds / 3, CANCEL_POLL_SECONDS)
        while True:
            if self._publishing:
                await asyncio.sleep(interval)
            elif await _set_within(self._stopping, interval) and not self._publishing:
                await self._end_child()
                return lambda: self._queue.release(self._claim)
            if time.monotonic() > self._deadline:
                self._child.kill()
                message = f"the job ran longer than {self._max_seconds:g} seconds"
                return lambda: self._fail(Failure(code="timeout", message=message))
            try:
                cancel_requested = await self._heartbeat()
            except LeaseLost:
                self._child.kill()
                raise
            except Unavailable:
                if time.monotonic() - self._renewed > self._lease_seconds:
                    self._child.kill()
                    raise
                continue
            if cancel_requested and not self._publishing:
                await self._end_child()
                return lambda: self._queue.settle(self._claim, JobStatus.CANCELLED)

    async def _end_child(self) -> None:
        # From here on the end of the child's messages is our doing, not a crash.
        self._ending = True
        await self._child.stop(STOP_GRACE_SECONDS)

    async def _heartbeat(self) -> bool:
        before = time.monotonic()
        try:
            # A call may take longer than what is left of the lease, and a child must not.
            async with asyncio.timeout(max(0.2, self._renewed + self._lease_seconds - before)):
                cancel_requested = await self._queue.heartbeat(
                    self._claim, self._lease_seconds, self._progress
                )
        except TimeoutError:
            raise Unavailable("Redis did not answer within the lease.") from None
        self._renewed = before
        return cancel_requested

    async def _append(self, message: EventMessage) -> None:
        await self._queue.append_event(
            self._claim, message.event, message.message, level=message.level, data=message.data
        )

    async def _succeed(self, message: SucceededMessage) -> None:
        job = self._claim.job
        if message.model is not None:
            change = Change(
                tenant=job.tenant, model=message.model, type="published", version=message.version
            )
            await self._queue.announce(self._claim, change)
        await self._queue.settle(self._claim, JobStatus.SUCCEEDED, result=message.result)

    async def _fail(self, failure: Failure) -> None:
        await self._queue.settle(self._claim, JobStatus.FAILED, error=failure)

    async def _retry(self, failure: Failure) -> None:
        # Full jitter keeps workers that failed together from coming back together.
        delay = random.uniform(0, min(60, 2**self._claim.attempt))  # noqa: S311
        await self._queue.retry(self._claim, delay, failure)

    def _crash(self, code: int) -> Callable[[], Awaitable[object]]:
        """The child ended without a last message: who would end it with SIGKILL but the kernel?"""
        if code == -signal.SIGKILL:
            failure = Failure(
                code="out_of_memory", message="the job was killed, most likely for want of memory"
            )
        else:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            failure = Failure(code="crashed", message=f"the job's process ended with {how}")
        if self._claim.job.kind is JobKind.INGEST:
            # The same upload would do the same again, and it holds up the others.
            return partial(self._fail, failure)
        return partial(self._retry, failure)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call until Redis answers, for as long as the lease may still be ours."""
        pause = 0.05
        while True:
            try:
                return await call()
            except Unavailable:
                if time.monotonic() - self._renewed > self._lease_seconds:
                    raise
                await asyncio.sleep(pause)
                pause = min(1.0, pause * 2)


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
