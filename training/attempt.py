"""One attempt of one job: a child process under a lease.

Two loops run side by side. One renews the lease, and is where a request to stop, the time limit and
a lost lease are noticed; the other carries the child's messages to Redis. The attempt ends in one
of these ways, and the child is always gone when it does:

    the child says so         settle `succeeded` or `failed`, or give back for a retry
    the child just ends       give back for a retry, `crashed` or `out_of_memory`
    cancel was requested      stop the child, settle `cancelled`
    pause was requested       stop the child and give the job back, which pauses it
    the worker stops          stop the child and give the job back; that uses up no attempt
    the time is up            kill the child, settle `failed` with `timeout`
    the lease is lost         kill the child and leave the job alone: it is someone else's

A child is stopped in two phases: it is asked to stop between two steps, and ended if it does not.
To be paused or given back it has the time to save its state; to be cancelled it needs none.

A worker that cannot reach Redis for a whole lease must assume that the lease is lost.

Before the child is told to publish, the job is marked as publishing. From then on no request counts
and no attempt settles anything but success: a job that was interrupted there comes back, and its
next attempt looks into the registry before all else. If the job has published, that attempt goes
on to success; if not, it withdraws the leave of those before it in the store, where one that was
frozen will find that, then takes back the mark, and what was put off counts.

Not here: what each end tells Redis (training.settlement).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from core.errors import LeaseLost, QualityGateFailed, Unavailable
from core.jobs import Failure, Job, JobStatus, StopReason
from core.outlook import Progress
from core.presence import Presence
from core.queue import Claim, JobQueue
from training.process import (
    AskMessage,
    ChildProcess,
    EventMessage,
    FailedMessage,
    ProgressMessage,
    RetryMessage,
    StoppedMessage,
    SucceededMessage,
)
from training.settlement import Decision, Expectation, Settlement

logger = logging.getLogger("graft.worker")
T = TypeVar("T")

POLL_SECONDS = 0.25
"""How often a running job looks whether it is to stop."""
CANCEL_SECONDS = 0.4
"""How long a cancelled child may take to its next step; with the poll, less than a second."""
TERM_SECONDS = 0.5
"""From SIGTERM to SIGKILL."""
PUBLISH_SECONDS = 60.0
"""How much longer than its time a job that publishes may take."""

Withdraw = Callable[[Job], Awaitable[bool]]


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
        stop_seconds: float,
        stopping: asyncio.Event,
        withdraw: Withdraw,
        expect: Expectation,
        presence: Presence,
    ) -> None:
        """`max_seconds` is what all attempts of the job may take together.

        `stop_seconds` is what a child may take to save its state; `stopping` is the worker's.

        `withdraw` keeps earlier attempts from publishing, and is False if one of them has; it may
        raise `Unavailable`. `expect` is as in `Settlement`.
        """
        self._queue = queue
        self._claim = claim
        self._child = child
        self._lease_seconds = lease_seconds
        self._began = time.monotonic()
        # An attempt that must first look what became of one that was publishing has time for that.
        self._deadline = self._began + max(0, max_seconds - claim.job.ran_seconds)
        self._max_seconds = max_seconds
        self._stop_seconds = stop_seconds
        self._stopping = stopping
        self._withdraw = withdraw
        self._settlement = Settlement(queue, claim, presence, expect)
        self._renewed = time.monotonic()
        self._progress: Progress | None = None
        self._publishing = claim.job.publishing
        self._ending = False

    async def run(self) -> None:
        """Run to one of the ends above; never raises for what happens to the job or to Redis."""
        relay = asyncio.create_task(self._relay())
        guard = asyncio.create_task(self._guard())
        try:
            await asyncio.wait({relay, guard}, return_when=asyncio.FIRST_COMPLETED)
            if guard.done() or self._ending:
                # The guard ends the child and decides, unless the child had come to its end first.
                decision, is_final = await guard
                said = None if is_final else await relay
                decision = said or decision
            else:
                decision = relay.result() or self._settlement.of_crash(await self._child.wait())
            await self._insist(decision)
        except (LeaseLost, Unavailable) as error:
            logger.warning("%s: left to others: %s", self._claim.job.id, error.message)
        finally:
            self._child.kill()
            for task in (relay, guard):
                task.cancel()
            await asyncio.gather(relay, guard, return_exceptions=True)
            await self._child.wait()

    async def _relay(self) -> Decision | None:
        """Carry messages until the child's last; return what settles the job, or None."""
        if self._claim.job.publishing and not await self._may_go_on():
            return _nothing
        await self._child.send_job(self._claim.job)
        while (message := await self._child.receive()) is not None:
            match message:
                case EventMessage():
                    await self._insist(partial(self._append, message))
                case ProgressMessage():
                    self._progress = message.progress
                case AskMessage():
                    await self._give_leave()
                case SucceededMessage():
                    return partial(self._settlement.succeed, message)
                case FailedMessage():
                    return self._failed(message.failure)
                case RetryMessage():
                    return partial(self._settlement.retry, message.failure)
                case StoppedMessage():
                    return None
        return None

    async def _may_go_on(self) -> bool:
        """Find out whether the job has published; if not, see that it cannot; take back the mark.

        False when what was put off meanwhile has ended the job.
        """
        if not await self._insist(lambda: self._withdraw(self._claim.job)):
            return True
        job = await self._insist(lambda: self._queue.clear_publishing(self._claim))
        self._publishing = False
        return job.status is JobStatus.RUNNING

    async def _give_leave(self) -> None:
        """Let the child publish, unless it is to stop: then the guard tells it so."""
        instead = await self._insist(
            lambda: self._queue.mark_publishing(self._claim, self._lease_seconds)
        )
        if instead is None and not self._ending:
            self._publishing = True
            await self._child.send_go()

    async def _guard(self) -> tuple[Decision, bool]:
        """Renew the lease until something must end the child.

        Returns what settles the job, and whether it does so whatever the child said last.
        """
        interval = min(self._lease_seconds / 3, POLL_SECONDS)
        while True:
            if self._publishing:
                await asyncio.sleep(interval)
            elif await _set_within(self._stopping, interval) and not self._publishing:
                await self._stop_child(StopReason.RELEASE)
                return self._settlement.release, False
            late_seconds = PUBLISH_SECONDS if self._publishing else 0
            if time.monotonic() > self._deadline + late_seconds:
                self._child.kill()
                message = f"the job ran longer than {self._max_seconds:g} seconds"
                return self._failed(Failure(code="timeout", message=message)), True
            reason = await self._renew()
            if reason is not None and not self._publishing:
                reason = await self._stop_child(reason)
                if reason is StopReason.CANCEL:
                    return self._settlement.cancel, True
                return self._settlement.release, False

    async def _renew(self) -> StopReason | None:
        """Renew the lease and return what is wanted; kill the child when the lease is lost."""
        try:
            return await self._heartbeat()
        except LeaseLost:
            self._child.kill()
            raise
        except Unavailable:
            if time.monotonic() - self._renewed > self._lease_seconds:
                self._child.kill()
                raise
            return None

    async def _stop_child(self, reason: StopReason) -> StopReason:
        """Ask the child to stop, end it when its time is over, and return why in the end.

        Meanwhile the lease is renewed, and a cancel may overtake what the child was stopped for.
        """
        # From here on the end of the child's messages is our doing, not a crash.
        self._ending = True
        await self._child.send_stop(reason)
        begun = time.monotonic()
        interval = min(self._lease_seconds / 3, POLL_SECONDS)
        while True:
            seconds = CANCEL_SECONDS if reason is StopReason.CANCEL else self._stop_seconds
            left = begun + seconds - time.monotonic()
            if left <= 0 or await self._child.ends_within(min(left, interval)):
                break
            if await self._renew() is StopReason.CANCEL and reason is not StopReason.CANCEL:
                reason, begun = StopReason.CANCEL, time.monotonic()
        await self._child.stop(TERM_SECONDS)
        return reason

    async def _heartbeat(self) -> StopReason | None:
        before = time.monotonic()
        try:
            # A call may take longer than what is left of the lease, and a child must not.
            async with asyncio.timeout(max(0.2, self._renewed + self._lease_seconds - before)):
                wanted = await self._queue.heartbeat(
                    self._claim, self._lease_seconds, self._progress,
                    self._claim.job.ran_seconds + before - self._began,
                )  # fmt: skip
        except TimeoutError:
            raise Unavailable("Redis did not answer within the lease.") from None
        self._renewed = before
        return wanted

    async def _append(self, message: EventMessage) -> None:
        await self._queue.append_event(
            self._claim, message.event, message.message, level=message.level, data=message.data
        )

    def _failed(self, failure: Failure) -> Decision:
        # One that had leave to publish may have done so: the next attempt looks. Only the quality
        # gate, which speaks last, is known to have let the version be published.
        is_open = self._publishing and failure.code != QualityGateFailed.code
        settle = self._settlement.retry if is_open else self._settlement.fail
        return partial(settle, failure)

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


async def _nothing() -> None:
    """What is left to do for a job that has ended already."""


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
