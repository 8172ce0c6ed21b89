"""What one service process is made of, put together once at start and passed to the endpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass

from starlette.requests import Request

from core.appraisal import Appraiser
from core.bootstrap import open_queue
from core.changes import ChangeFeed
from core.files import FileStore
from core.identifiers import DEFAULT_TENANT
from core.queue import JobQueue
from core.registry import Registry
from core.runs import RunStore
from core.settings import Settings
from core.store import ArtifactStore
from service.attendance import Attendance
from service.auto_rollback import AutoRollback
from service.backbones import BackboneTrunks
from service.forecast import Forecaster
from service.hot_loader import HotLoader
from service.job_history import JobHistory
from service.metrics import ModelLabels
from service.predictor import Predictor
from service.watch import RegistryWatch


@dataclass(frozen=True)
class Runtime:
    """The parts of a running service process."""

    settings: Settings
    store: ArtifactStore
    queue: JobQueue
    history: JobHistory
    runs: RunStore
    appraiser: Appraiser
    forecaster: Forecaster
    feed: ChangeFeed
    registry: Registry
    loader: HotLoader
    attendance: Attendance
    watch: RegistryWatch
    rollback: AutoRollback
    backbones: BackboneTrunks
    predictor: Predictor

    @classmethod
    def start(cls, settings: Settings) -> Runtime:
        """Connect, begin to load what the registry holds, and return; must run in an event loop."""
        store = ArtifactStore(settings.store_url)
        queue, feed, presence = open_queue(settings)
        attendance = Attendance(presence)
        registry = Registry(store)
        threads = inference_threads(settings)
        loader = HotLoader(
            registry,
            threads=threads,
            max_pixels=settings.max_pixels,
            max_queued_rows=settings.max_queued_rows,
            memory_bytes=settings.model_memory_bytes,
            pinned_models=settings.pinned_models,
        )
        watch = RegistryWatch(
            loader,
            feed,
            poll_seconds=settings.poll_seconds,
            on_change=attendance.acknowledge,
        )
        watch.start()
        attendance.start()
        labels = ModelLabels(settings.labelled_models)
        rollback = AutoRollback(registry.releases, feed, loader.reconcile_model, labels)
        predictor = Predictor(
            loader,
            rollback,
            threads=threads,
            max_text_chars=settings.max_text_chars,
            max_queued_rows=settings.max_queued_rows,
            labels=labels,
        )
        runs = RunStore(store)
        history, forecast = JobHistory(queue, runs), Forecaster(queue, presence)
        appraiser = Appraiser(store)
        return cls(
            settings, store, queue, history, runs, appraiser, forecast, feed, registry, loader,
            attendance, watch, rollback, BackboneTrunks(registry, loader.live), predictor,
        )  # fmt: skip

    async def close(self) -> None:
        """Stop loading, batching and talking to Redis."""
        await self.watch.close()
        await self.attendance.close()
        await self.loader.close()
        await self.predictor.close()
        await self.rollback.close()
        await self.queue.close()

    def files(self, tenant: str) -> FileStore:
        """The uploaded files of a tenant."""
        return FileStore(self.store, tenant)


def inference_threads(settings: Settings) -> int:
    """ONNX Runtime threads of this process: as set, or the cores shared out among processes."""
    if settings.inference_threads:
        return settings.inference_threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // settings.service_workers)


def runtime(request: Request) -> Runtime:
    """The process's runtime, from a request."""
    started: Runtime = request.app.state.runtime
    return started


def tenant(request: Request) -> str:
    """The tenant that a request acts for; the only one until there are keys by tenant."""
    return DEFAULT_TENANT
