"""Whole jobs in this process, and what the models that they publish do on test rows.

A job goes through ingest and `training.pipeline.fine_tune`, as in a worker's child process; its
model is loaded and asked as the service does it. Each job has a tenant of its own, so that none
finds features of another. Not here: HTTP, the queue (bench/jobs.py), which jobs to run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_sets import DataSet, Row, Split, as_upload

from core.datasets import FileErrors, Modality, UploadedFile
from core.files import FileStore
from core.head import Head
from core.jobs import EventLevel, FineTuneRequest, Job, JobKind, JobStatus
from core.manifests import ModelManifest
from core.preprocessing import FloatArray
from core.registry import Registry
from core.runs import REPORT
from core.settings import Settings
from core.store import ArtifactStore
from core.trunk import Trunk
from training.calibration import quality
from training.feature_cache import FeatureCache
from training.features import extract
from training.ingest import Limits, ingest
from training.pipeline import fine_tune
from training.report import Report
from training.trunks import ensure_trunk

BACKBONES = {Modality.TEXT: "minilm", Modality.IMAGE: "efficientnet-lite0"}
WARM_SETS = {
    Modality.TEXT: DataSet("support", 6),
    Modality.IMAGE: DataSet("digits", 6),
}
SHOWN = (
    "unfrozen", "ladder_ended", "frozen_head_kept", "deltas_kept", "backbone_tuned",
    "strategy_chosen",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a job published, and what it took: `stages` are the seconds of each."""

    manifest: ModelManifest
    report: Report
    seconds: float
    cpu_seconds: float
    stages: dict[str, float]


@dataclass(frozen=True)
class Judged:
    """How a model did on test rows; ECE and nats per row are of the probabilities it serves."""

    accuracy: float
    ece: float
    nll: float


@dataclass
class Listener:
    """A job's reporter that keeps the seconds of stages and prints what was decided."""

    verbose: bool
    stages: dict[str, float] = field(default_factory=dict)

    def event(self, type: str, message: str, *, level: EventLevel = "info", **data: Any) -> None:
        if "seconds" in data and "stage" in data:
            self.stages[data["stage"]] = data["seconds"]
        if self.verbose or type in SHOWN:
            print(f"    {message}", flush=True)

    def progress(self, stage: str, fraction: float) -> None:
        """Nothing to show."""

    def check(self) -> None:
        """Nobody stops it."""

    def authorise(self) -> None:
        """It may always publish."""


class Workshop:
    """Runs jobs on one store, so that each trunk is exported once."""

    def __init__(self, folder: Path, data: Path, *, verbose: bool = False) -> None:
        self._store = ArtifactStore(str(folder))
        self._registry = Registry(self._store)
        self._settings = Settings()
        self._data = data
        self._verbose = verbose
        self._trunks: dict[Modality, Trunk] = {}
        self._tenants = 0
        self.threads = torch.get_num_threads()

    def trunk(self, modality: Modality) -> Trunk:
        """Return the backbone's trunk; the first time a small job warms up all that jobs load."""
        if modality not in self._trunks:
            self._trunks[modality] = ensure_trunk(
                self._registry, BACKBONES[modality], hf_models=(), threads=1,
                max_pixels=self._settings.max_pixels, on_export=lambda: None,
            )  # fmt: skip
            warm = WARM_SETS[modality].draw(self._data, 0).train
            print(f"    warming up: {len(warm)} rows", flush=True)
            self.start(modality, warm)("gradual")
        return self._trunks[modality]

    def start(self, modality: Modality, rows: list[Row]) -> Callable[..., Trained]:
        """Upload rows as a new tenant; return what runs a job on them, over and over if need be."""
        self._tenants += 1
        tenant = f"bench-{self._tenants}"
        files = FileStore(self._store, tenant)
        filename, data = as_upload(modality, rows)
        self._store.put_new(files.upload_key("file-1"), data)
        uploaded = UploadedFile(id="file-1", filename=filename, bytes=len(data), created_at=0)
        files.complete(uploaded)
        outcome = ingest(files, "file-1", Limits.from_settings(self._settings))
        if isinstance(outcome, FileErrors):
            raise SystemExit(outcome.summary())
        jobs = iter(range(1, 1_000))

        def run(strategy: str, seed: int = 0, **request: Any) -> Trained:
            return self._run(tenant, f"ftjob-{next(jobs)}", modality, strategy, seed, request)

        return run

    def judge(self, manifest: ModelManifest, split: Split) -> Judged:
        """Ask a model for the test rows."""
        if manifest.kind == "linear":
            head = Head.load(self._registry, manifest)
            features = self.plain_features(split.modality, split.test)
        else:
            trunk = Trunk.load_for(
                self._registry, manifest, threads=1, max_pixels=self._settings.max_pixels
            )
            head = Head.load(self._registry, manifest, trunk)
            items: Any = [item for item, _ in split.test]
            features = extract(
                trunk, items, threads=self.threads, on_progress=lambda *_: None,
                deltas=trunk.bank.gather([head.adapter]),
            )  # fmt: skip
        probabilities = head.predict(features)
        truth = np.array([manifest.labels.index(label) for _, label in split.test])
        found = quality(probabilities, truth)
        return Judged(float((probabilities.argmax(axis=1) == truth).mean()), found.ece, found.nll)

    def plain_features(
        self, modality: Modality, rows: list[Row], tenant: str = "rows"
    ) -> FloatArray:
        """Features of rows, from the cache of a tenant that runs no jobs."""
        cache = FeatureCache(
            self._store, tenant, self.trunk(modality), max_days=1,
            max_bytes=self._settings.feature_cache_bytes,
        )  # fmt: skip
        items: Any = [item for item, _ in rows]
        return cache.extract(items, threads=self.threads, on_progress=lambda *_: None)

    def _run(
        self, tenant: str, job_id: str, modality: Modality, strategy: str, seed: int,
        request: dict[str, Any],
    ) -> Trained:  # fmt: skip
        asked = {
            "model": BACKBONES[modality], "training_file": "file-1", "strategy": strategy,
            "seed": seed, **request,
        }  # fmt: skip
        job = Job(
            tenant=tenant, id=job_id, kind=JobKind.FINE_TUNE, status=JobStatus.RUNNING,
            spec=FineTuneRequest.model_validate(asked).model_dump(mode="json"), attempt=1,
            created_at=time.time(),
        )  # fmt: skip
        listener = Listener(self._verbose)
        began, began_cpu = time.perf_counter(), time.process_time()
        manifest = fine_tune(job, self._store, self._settings, listener, self._trunks.get(modality))
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
        report = Report.model_validate_json(self._registry.file(manifest, REPORT))
        return Trained(manifest, report, seconds, cpu_seconds, listener.stages)
