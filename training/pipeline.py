"""A fine-tuning job from beginning to end; read this first.

    data ──▶ trunk ──▶ features ──▶ fit ──▶ (unfreeze) ──▶ evaluate ──▶ export ──▶ publish

Each stage is a module of its own and is reported as an event with its seconds. The pipeline runs in
a child process (training.child), knows nothing of Redis, and may be run again from the start by
another attempt at any time: what it stores is content-addressed or create-exclusive.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from core.adapters import Adapter
from core.backbones import is_allowed
from core.checkpoints import Checkpoints
from core.errors import DataError
from core.files import FileStore
from core.jobs import FineTuneRequest, Job
from core.manifests import DatasetReference, ModelManifest, Precision
from core.preprocessing import FloatArray
from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from core.trunk import Trunk
from training import backbones
from training.data import Dataset, read_dataset
from training.evaluation import Metrics, evaluate
from training.export import export_adapted, export_head
from training.feature_cache import FeatureCache
from training.features import extract
from training.fit import Fit, fit
from training.gradual import RESERVED_SHARE
from training.precision import Candidates, Choice, choose
from training.stopping import Stoppable
from training.strategies import Setting, Tuned, unfreeze
from training.trunks import ensure_trunk

RELEASED_BY = "fine_tune"


class Reporter(Stoppable, Protocol):
    """Where a job says how it goes; `training.child.Reporter` is the real one."""

    def event(self, type: str, message: str, **data: object) -> None:
        """Add a line to the job's history."""

    def progress(self, stage: str, fraction: float) -> None:
        """Say how far the whole job is, 0 to 1."""

    def authorise(self) -> None:
        """Return when the job may be published, or raise `Stopped`; never with a lost lease."""


@dataclass(frozen=True)
class Rows:
    """Features, float32 [n, dim], and the class of each row."""

    features: FloatArray
    targets: npt.NDArray[np.int64]


class FineTune:
    """One attempt at one job; `run` is its table of contents."""

    def __init__(
        self, job: Job, store: ArtifactStore, settings: Settings, reporter: Reporter
    ) -> None:
        self._job = job
        self._request = FineTuneRequest.model_validate(job.spec)
        self._store = store
        self._registry = Registry(store)
        self._files = FileStore(store, job.tenant)
        self._settings = settings
        self._reporter = reporter
        self._checkpoints = Checkpoints(store, job.tenant, job.id)
        self._began = time.monotonic()
        self._threads = torch.get_num_threads()
        self._seconds: dict[str, float] = {}
        self._choice: Choice | None = None

    def run(self) -> ModelManifest:
        """Return the published version's manifest; raises the errors of `core.errors`."""
        published = self._registry.publication(self._job.tenant, self._job.id)
        if published is not None:
            # An attempt before this one got as far as deciding what to publish.
            self._reporter.authorise()
            return self._release(self._registry.roll_forward(published))

        with self._stage("data", 0.0):
            train, held_out = self._read()
            labels = train.manifest.classes
        with self._stage("trunk", 0.05):
            trunk = self._trunk(train, held_out)
        with self._stage("features", 0.1):
            rows = Rows(self._extract(trunk, train, 0.1, 0.6), train.targets(labels, param=""))
            other = None if held_out is None else self._held_out(trunk, held_out, labels)
        with self._stage("fit", 0.65):
            fitted = fit(rows.features, rows.targets, len(labels), seed=self._request.seed)
        tuned = None
        if self._request.strategy == "gradual":
            with self._stage("unfreeze", 0.7):
                tuned = self._unfreeze(trunk, train, rows)
                if tuned is not None and held_out is not None:
                    other = self._adapted(trunk, tuned, held_out, labels)
        with self._stage("evaluate", 0.9):
            metrics = self._evaluate(fitted, tuned, rows, other, labels)
        with self._stage("export", 0.92):
            files = self._export(trunk, fitted, tuned, rows)
            files["report.json"] = self._report(train, fitted, tuned, metrics)
            self._reporter.event("exported", "Head exported to ONNX and checked against torch.")
        with self._stage("publish", 0.95):
            self._reporter.authorise()
            draft = self._draft(trunk, train, fitted, tuned, metrics)
            return self._release(self._registry.publish(draft, files))

    # -- stages ------------------------------------------------------------------------------

    def _read(self) -> tuple[Dataset, Dataset | None]:
        train = read_dataset(self._files, self._request.training_file, param="training_file")
        if self._request.validation_file is None:
            return train, None
        held_out = read_dataset(self._files, self._request.validation_file, param="validation_file")
        if held_out.manifest.modality is not train.manifest.modality:
            raise DataError(
                f"the training file holds {train.manifest.modality} rows and the validation file "
                f"{held_out.manifest.modality}",
                param="validation_file",
            )
        return train, held_out

    def _trunk(self, train: Dataset, held_out: Dataset | None) -> Trunk:
        if not is_allowed(self._request.model, self._settings.hf_models):
            raise DataError("this worker is not set up for the backbone", param="model")
        candidates = Candidates(
            lambda precision: self._open_trunk(precision, train),
            lambda trunk, data: self._extract(trunk, data, 0.05, 0.1),
            train,
            held_out,
        )
        trunk, self._choice = choose(self._request, candidates)
        if self._choice is not None:
            self._reporter.event(
                "precision_chosen",
                f"Precision {self._choice.precision}: {self._choice.reason}.",
                **self._choice.model_dump(mode="json"),
            )
        return trunk

    def _open_trunk(self, precision: Precision, train: Dataset) -> Trunk:
        trunk = ensure_trunk(
            self._registry,
            self._request.model,
            precision=precision,
            hf_models=self._settings.hf_models,
            threads=1,  # `extract` runs one batch per thread
            max_pixels=self._settings.max_pixels,
            on_export=lambda: self._reporter.event(
                "stage",
                f"First use of this backbone in {precision} here: exporting its trunk.",
                stage="trunk",
            ),
        )
        if trunk.modality is not train.manifest.modality:
            raise DataError(
                f"{self._request.model} reads {trunk.modality}; the training file holds "
                f"{train.manifest.modality} rows",
                param="model",
            )
        return trunk

    def _extract(self, trunk: Trunk, data: Dataset, begin: float, end: float) -> FloatArray:
        def on_progress(done: int, total: int) -> None:
            self._reporter.progress("features", begin + (end - begin) * done / total)
            self._reporter.check()

        cache = FeatureCache(
            self._store,
            self._job.tenant,
            trunk,
            max_bytes=self._settings.feature_cache_bytes,
            max_days=self._settings.feature_cache_days,
        )
        return cache.extract(data.items, threads=self._threads, on_progress=on_progress)

    def _held_out(self, trunk: Trunk, data: Dataset, labels: list[str]) -> Rows:
        targets = data.targets(labels, param="validation_file")
        return Rows(self._extract(trunk, data, 0.6, 0.65), targets)

    def _unfreeze(self, trunk: Trunk, train: Dataset, rows: Rows) -> Tuned | None:
        if not trunk.manifest.slots:
            self._reporter.event(
                "frozen_head_kept",
                "This backbone has no layers that take deltas; the frozen head ships.",
            )
            return None
        setting = Setting(
            request=self._request,
            attempt=self._job.attempt,
            checkpoints=self._checkpoints,
            reporter=self._reporter,
            threads=self._threads,
            deadline=self._began + (1 - RESERVED_SHARE) * self._request.max_seconds,
            draft=lambda step, adapter: self._manifest(
                trunk, train, step.strength, {"accuracy": step.accuracy, "nll": step.nll},
                adapter, step.blocks,
            ),
        )  # fmt: skip
        backbone = backbones.load(self._request.model, self._settings.hf_models)
        return unfreeze(setting, trunk, backbone, train, rows.targets, rows.features)

    def _adapted(self, trunk: Trunk, tuned: Tuned, data: Dataset, labels: list[str]) -> Rows:
        """The validation file's rows as the tuned model sees them."""
        features = extract(
            trunk,
            data.items,
            threads=self._threads,
            on_progress=lambda *_: self._reporter.check(),
            deltas=tuned.deltas(trunk),
        )
        return Rows(features, data.targets(labels, param="validation_file"))

    def _evaluate(
        self, fitted: Fit, tuned: Tuned | None, rows: Rows, other: Rows | None, labels: list[str]
    ) -> Metrics:
        """On the validation file if there is one, or else on rows that the model has not seen."""
        if other is not None:
            head = fitted.head if tuned is None else tuned.head
            metrics = evaluate(head.predict(other.features), other.targets, labels)
            source = "on the validation file"
        elif tuned is not None:
            metrics = evaluate(tuned.probabilities, tuned.targets, labels)
            source = "on held-out rows"
        else:
            metrics = evaluate(fitted.out_of_fold, rows.targets, labels)
            source = "cross-validated"
        self._reporter.event(
            "metrics",
            f"Accuracy {metrics.accuracy:.3f} ± {metrics.accuracy_error:.3f} {source}; "
            f"the most frequent class alone gives {metrics.majority_accuracy:.3f}.",
            **metrics.summary(),
        )
        return metrics

    def _export(
        self, trunk: Trunk, fitted: Fit, tuned: Tuned | None, rows: Rows
    ) -> dict[str, bytes]:
        if tuned is None:
            return export_head(fitted.head, rows.features)
        backbone = backbones.load(self._request.model, self._settings.hf_models)
        return export_adapted(tuned.head, tuned.adapter, trunk, backbone)

    def _release(self, manifest: ModelManifest) -> ModelManifest:
        if self._request.promote:
            self._registry.promote(manifest, created_by=RELEASED_BY, reason=f"job {manifest.job}")
        self._checkpoints.drop_states()
        self._reporter.event(
            "published", f"Published as {manifest.reference}.", model=manifest.reference
        )
        return manifest

    # -- what is written ---------------------------------------------------------------------

    def _draft(
        self, trunk: Trunk, train: Dataset, fitted: Fit, tuned: Tuned | None, metrics: Metrics
    ) -> ModelManifest:
        if tuned is None:
            return self._manifest(trunk, train, fitted.strength, metrics.summary())
        return self._manifest(
            trunk, train, tuned.strength, metrics.summary(), tuned.adapter, tuned.blocks
        )

    def _manifest(
        self, trunk: Trunk, train: Dataset, strength: float, metrics: dict[str, float],
        adapter: Adapter | None = None, blocks: int = 0,
    ) -> ModelManifest:  # fmt: skip
        return ModelManifest(
            tenant=self._job.tenant,
            name=model_name(self._job, self._request),
            version=0,
            kind="linear" if adapter is None else "low_rank",
            rank=0 if adapter is None else adapter.rank,
            blocks=blocks,
            job=self._job.id,
            attempt=self._job.attempt,
            created_at=time.time(),
            backbone=self._request.model,
            trunk=trunk.manifest.digest,
            modality=trunk.modality,
            dim=trunk.dim,
            labels=train.manifest.classes,
            files={},
            dataset=DatasetReference(
                file=train.file, sha256=train.manifest.sha256, rows=train.manifest.rows
            ),
            training=self._request.model_dump(mode="json") | {"l2_strength": strength},
            metrics=metrics,
        )

    def _report(self, train: Dataset, fitted: Fit, tuned: Tuned | None, metrics: Metrics) -> bytes:
        report = {
            "job": self._job.id,
            "request": self._request.model_dump(mode="json"),
            "dataset": train.manifest.model_dump(mode="json"),
            "metrics": metrics.model_dump(mode="json"),
            "candidates": [candidate.model_dump(mode="json") for candidate in fitted.candidates],
            "steps": []
            if tuned is None
            else [step.model_dump(mode="json") for step in tuned.steps],
            "precision": self._choice and self._choice.model_dump(mode="json"),
            "seconds": self._seconds,
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "onnxruntime": version("onnxruntime"),
                "cores": os.cpu_count(),
                "threads": self._threads,
            },
        }
        return json.dumps(report, indent=1).encode()

    @contextmanager
    def _stage(self, name: str, fraction: float) -> Iterator[None]:
        self._reporter.check()
        self._reporter.progress(name, fraction)
        begun = time.perf_counter()
        yield
        self._seconds[name] = round(time.perf_counter() - begun, 3)
        self._reporter.event(
            "stage", f"{name}: {self._seconds[name]} s", stage=name, seconds=self._seconds[name]
        )


def fine_tune(
    job: Job, store: ArtifactStore, settings: Settings, reporter: Reporter
) -> ModelManifest:
    """Run a `fine_tune` job; return what it published."""
    return FineTune(job, store, settings, reporter).run()


def model_name(job: Job, request: FineTuneRequest) -> str:
    """The name under which a job publishes: its suffix, or one made of the job's id."""
    return request.suffix or f"model-{job.id.rsplit('-', 1)[-1][:12]}"
