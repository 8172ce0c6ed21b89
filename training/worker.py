"""The training worker: a supervisor that takes jobs from the queue and runs each in a child.

It never imports torch: it holds leases, beats, watches for cancels, and starts and ends children.
There is one *lane* per kind of job, so that parsing an upload never waits behind a long training.
Each lane keeps a warm spare child that has done its imports and loads what the last job used; it is
started when that job has ended, for while it starts it takes the processors that a small job needs.
Beside the lanes, finished jobs are archived (training.archive), what crashes left is removed
(training.collection), and what the first jobs will need is exported (training.first_trunks). Not
here: one attempt's life (training.attempt), what a job does (training.pipeline, training.ingest).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import suppress

from pydantic import ValidationError

from core.appraisal import Appraiser
from core.bootstrap import open_queue
from core.errors import GraftError, NoSpace, Unavailable
from core.estimate import estimate
from core.jobs import FineTuneRequest, Job, JobKind
from core.outlook import Estimate
from core.presence import Presence, Role, keep_presence, process_name
from core.queue import Claim, JobQueue
from core.registry import Registry
from core.runs import RunStore
from core.settings import Settings
from core.store import ArtifactStore
from training.archive import keep_archive
from training.attempt import Attempt
from training.collection import keep_collected
from training.first_trunks import export_when_idle
from training.process import ChildProcess

logger = logging.getLogger("graft.worker")

IDLE_WAIT_SECONDS = 1.0
SPARE_PAUSE_SECONDS = 1.0
READY_SECONDS = 120.0


class Lane:
    """Takes jobs of one kind, one at a time."""

    def __init__(
        self,
        kind: JobKind,
        queue: JobQueue,
        presence: Presence,
        registry: Registry,
        appraiser: Appraiser,
        settings: Settings,
        stopping: asyncio.Event,
    ) -> None:
        self._kind = kind
        self._queue = queue
        self._presence = presence
        self._registry = registry
        self._appraiser = appraiser
        self._settings = settings
        self._stopping = stopping
        self._worker = process_name()
        self.is_idle = True
        """Whether it has no job."""
        self._spare: ChildProcess | None = None
        self._last_model: str | None = None
        self._spare_pause_seconds = SPARE_PAUSE_SECONDS

    async def run(self) -> None:
        """Take jobs until the worker stops."""
        try:
            while not self._stopping.is_set():
                await self._keep_spare()
                claim = await self._next_claim() if self._spare and self._spare.is_alive else None
                if claim is not None and self._spare is not None:
                    child, self._spare = self._spare, None
                    self.is_idle = False
                    await self._attempt(claim, child)
                    self.is_idle = True
                    self._spare_pause_seconds = SPARE_PAUSE_SECONDS
        finally:
            if self._spare is not None:
                await self._spare.stop(grace_seconds=1)

    async def _keep_spare(self) -> None:
        """Have a child ready; one that keeps dying before its job is tried ever more rarely."""
        if self._spare is not None and not self._spare.is_alive:
            code = await self._spare.wait()
            logger.error("%s lane: a spare child ended with code %d", self._kind, code)
            self._spare = None
            await self._pause(self._spare_pause_seconds)
            self._spare_pause_seconds = min(60, 2 * self._spare_pause_seconds)
        if self._spare is None and not self._stopping.is_set():
            self._spare = await ChildProcess.start(self._kind, self._last_model)
            if not await self._gets_ready(self._spare):
                await self._spare.stop(grace_seconds=1)

    async def _gets_ready(self, child: ChildProcess) -> bool:
        """Wait for a child's imports; False when they fail, take too long, or the worker stops."""
        ready = asyncio.create_task(child.wait_until_ready())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait(
                {ready, stopping}, timeout=READY_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            return ready.done() and ready.result()
        finally:
            for task in (ready, stopping):
                task.cancel()
            await asyncio.gather(ready, stopping, return_exceptions=True)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _next_claim(self) -> Claim | None:
        try:
            claim = await self._queue.claim(self._kind, self._worker, self._settings.lease_seconds)
            if claim is None:
                await self._queue.wait(self._kind, IDLE_WAIT_SECONDS)
        except Unavailable as error:
            logger.warning("%s lane: %s", self._kind, error.message)
            await self._pause(IDLE_WAIT_SECONDS)
            return None
        return claim

    async def _attempt(self, claim: Claim, child: ChildProcess) -> None:
        job = claim.job
        model = job.spec.get("model")
        self._last_model = model if isinstance(model, str) else None
        logger.info("%s: attempt %d in process %d", job.id, claim.attempt, child.pid)
        await Attempt(
            self._queue,
            claim,
            child,
            lease_seconds=self._settings.lease_seconds,
            max_seconds=self._max_seconds(claim),
            # The parsing of a file has no state to save.
            stop_seconds=self._settings.stop_seconds if self._kind is JobKind.FINE_TUNE else 0,
            stopping=self._stopping,
            withdraw=self._withdraw,
            expect=self._expect,
            presence=self._presence,
        ).run()
        logger.info("%s: attempt %d ended", job.id, claim.attempt)

    async def _withdraw(self, job: Job) -> bool:
        try:
            withdraw = self._registry.withdraw
            found = await asyncio.to_thread(withdraw, job.tenant, job.id, job.attempt)
        except NoSpace:
            # Nor was there room to publish. Waiting for some would keep the job from ending.
            found = await asyncio.to_thread(self._registry.publication, job.tenant, job.id)
        return found is None

    async def _expect(self, job: Job) -> Estimate | None:
        """Return what is expected of a fine-tune job; never raises."""
        try:
            request = FineTuneRequest.model_validate(job.spec)
            work = await asyncio.to_thread(self._appraiser.appraise, job.tenant, request)
        except (GraftError, ValidationError) as error:
            logger.warning("%s: it is not known how long it will take: %s", job.id, error)
            return None
        return estimate(work) if work else None

    def _max_seconds(self, claim: Claim) -> float:
        if self._kind is JobKind.INGEST:
            return self._settings.ingest_seconds
        limit = claim.job.spec.get("max_seconds")
        return float(limit) if isinstance(limit, int | float) else 3600.0


async def work(settings: Settings) -> None:
    """Run both lanes, and archive what ends, until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    queue, _, presence = open_queue(settings)
    store = ArtifactStore(settings.store_url)
    beating = asyncio.create_task(keep_presence(presence, Role.WORKER, process_name()))
    logger.info("worker %d is ready", os.getpid())
    try:
        async with asyncio.TaskGroup() as lanes:
            registry = Registry(store)
            appraiser = Appraiser(store)
            started = [
                Lane(kind, queue, presence, registry, appraiser, settings, stopping)
                for kind in JobKind
            ]
            for lane in started:
                lanes.create_task(lane.run())
            if settings.export_when_idle:

                def is_idle() -> bool:
                    return all(lane.is_idle for lane in started)

                lanes.create_task(export_when_idle(registry, is_idle, stopping))
            lanes.create_task(keep_archive(queue, RunStore(store), stopping))
            lanes.create_task(keep_collected(queue, store, stopping, settings.leftover_seconds))
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await queue.close()


def main() -> None:
    """Entry point of `graft-worker`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(work(Settings()))


if __name__ == "__main__":
    main()
