"""A fine-tuning job from beginning to end; read this first.

    data ─▶ trunk ─▶ features ─▶ inspect ─▶ fit ─▶ (unfreeze) ─▶ evaluate ─▶ report
         ─▶ export ─▶ publish

Each stage is a module of its own and is reported as an event with its seconds. The pipeline runs in
a child process (training.child), knows nothing of Redis, and may be run again from the start by
another attempt at any time: what it stores is content-addressed or create-exclusive.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from core.adapters import Adapter
from core.backbones import AUTO, candidates, is_allowed
from core.checkpoints import Checkpoints
from core.errors import DataError, QualityGateFailed
from core.files import FileStore
from core.head import Head
from core.jobs import EventLevel, FineTuneRequest, Job
from core.manifests import DatasetReference, GateOutcome, ModelManifest, Precision
from core.novelty import NOVELTY_FILE, Novelty
from core.preprocessing import FloatArray
from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from core.trunk import Trunk
from training import backbones
from training.assessment import Alternative, Assessment, Source, assess
from training.backbone_choice import choose_backbone
from training.data import Dataset, read_dataset
from training.data_report import DataReport, RowSet, describe, inspect_data
from training.export import export_adapted, export_head
from training.feature_cache import FeatureCache
from training.features import extract
from training.fit import Fit, fit
from training.gate import Comparison, HeldOut, compare_with_current, judge
from training.gradual import RESERVED_SHARE
from training.investigation import Investigation, investigate
from training.lineage import continue_data, find_parent
from training.novelty import estimate_novelty, estimate_tuned_novelty
from training.precision import Candidates, choose
from training.reporting import Choices, Evidence, write_report
from training.search_state import Step
from training.stopping import Stoppable
from training.strategies import Setting, Tuned, decide, unfreeze
from training.trunks import ensure_trunk, require_quantisable

RELEASED_BY = "fine_tune"
SOURCES: dict[Source, str] = {
    "cross_validation": "cross-validated",
    "held_out_rows": "on held-out rows",
    "validation_file": "on the validation file",
}


class Reporter(Stoppable, Protocol):
    """Where a job says how it goes; `training.child.Reporter` is the real one."""

    def event(self, type: str, message: str, *, level: EventLevel = "info", **data: object) -> None:
        """Add a line to the job's history."""

    def progress(self, stage: str, fraction: float) -> None:
        """Say how far the whole job is, 0 to 1."""

    def authorise(self) -> None:
        """Return when the job may be published, or raise `Stopped`; never with a lost lease."""


@dataclass(frozen=True)
class Rows:
    """Features, float32 [n, dim], and the class of each row."""

    data: Dataset
    features: FloatArray
    targets: npt.NDArray[np.int64]

    def subset(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """Some of the rows; the manifest stays that of the whole file."""
        items = [self.data.items[n] for n in numbers]
        labels = [self.data.labels[n] for n in numbers]
        data = replace(self.data, items=items, labels=labels)
        return Rows(data, self.features[numbers], self.targets[numbers])

    @property
    def row_set(self) -> RowSet:
        """The rows as reports see them."""
        return RowSet(self.data.items, self.features, self.data.labels)


class FineTune:
    """One attempt at one job; `run` is its table of contents."""

    def __init__(
        self, job: Job, store: ArtifactStore, settings: Settings, reporter: Reporter,
        trunk: Trunk | None = None,
    ) -> None:  # fmt: skip
        self._job = job
        self._request = FineTuneRequest.model_validate(job.spec)
        self._store = store
        self._registry = Registry(store)
        self._files = FileStore(store, job.tenant)
        self._settings = settings
        self._reporter = reporter
        self._loaded_trunk = trunk
        self._checkpoints = Checkpoints(store, job.tenant, job.id)
        self._began = time.monotonic()
        self._threads = torch.get_num_threads()
        self._seconds: dict[str, float] = {}
        self._choices = Choices()
        self._steps: tuple[Step, ...] = ()
        self._parent: ModelManifest | None = None
        self._earlier: tuple[str, ...] = ()
        self._contents: dict[str, set[bytes]] = {}

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
            targets = train.targets(labels, param="")
            rows = Rows(train, self._extract(trunk, train, 0.1, 0.55), targets)
            other = None if held_out is None else self._held_out(trunk, held_out, labels)
        with self._stage("inspect", 0.6):
            data = self._inspect(rows, other, trunk)
        with self._stage("fit", 0.62):
            fitted = fit(rows.features, rows.targets, len(labels), seed=self._request.seed)
        tuned, adapted = None, other
        if self._request.strategy != "feature_extraction":
            with self._stage("unfreeze", 0.7):
                tuned = self._unfreeze(trunk, train, rows, fitted)
                if tuned is not None and held_out is not None:
                    adapted = self._adapted(trunk, tuned, held_out, labels)
        with self._stage("evaluate", 0.85):
            assessment = self._evaluate(fitted, tuned, rows, adapted, labels)
            comparison, gate = self._gate(assessment, other or rows, labels, trunk)
        with self._stage("report", 0.87):
            found = self._investigate(rows, other, fitted, assessment, trunk)
            evidence = Evidence(
                train, rows.row_set, targets, held_out, other.row_set if other else None, trunk,
                data, fitted, self._steps, assessment, found, gate,
                comparison.current if comparison else None, self._choices,
                self._parent.reference if self._parent else None,
            )  # fmt: skip
            name = model_name(self._job, self._request)
            report = write_report(self._job.id, name, self._request, evidence, self._seconds)
        with self._stage("export", 0.94):
            files = self._export(trunk, assessment, tuned, rows) | report
            files[NOVELTY_FILE] = self._novelty(tuned, rows, len(labels)).write()
            self._reporter.event("exported", "Head exported to ONNX and checked against torch.")
        with self._stage("publish", 0.95):
            self._reporter.authorise()
            draft = self._draft(trunk, train, fitted, tuned, assessment, gate)
            return self._release(self._registry.publish(draft, files))

    # -- stages ------------------------------------------------------------------------------

    def _read(self) -> tuple[Dataset, Dataset | None]:
        train = read_dataset(self._files, self._request.training_file, param="training_file")
        self._parent = find_parent(self._registry, self._job.tenant, self._request.model)
        if self._parent is not None:
            train = self._continue(self._parent, train)
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

    def _choose_backbone(self, train: Dataset) -> None:
        """Settle which backbone `auto` is, and go on as if the request had named it."""
        models = candidates(
            train.manifest.modality,
            self._settings.hf_models,
            to_tune=self._request.strategy != "feature_extraction",
        )

        def features(model: str, sample: Dataset) -> FloatArray | None:
            trunk = self._load_trunk(model, "fp32")
            if trunk.modality is not train.manifest.modality:
                return None
            if self._request.precision == "int8":
                require_quantisable(model, trunk.manifest.slots)
            return self._extract(trunk, sample, 0.05, 0.1)

        choice = choose_backbone(models, features, train, self._request.seed)
        self._choices = replace(self._choices, backbone=choice)
        self._reporter.event(
            "backbone_chosen",
            f"Backbone {choice.model}: {choice.reason}.",
            **choice.model_dump(mode="json"),
        )
        self._request = self._request.model_copy(update={"model": choice.model})

    def _continue(self, parent: ModelManifest, new: Dataset) -> Dataset:
        """From here on this is a job on the parent's backbone and on all rows so far."""
        self._request = self._request.model_copy(update={"model": parent.backbone})
        continued = continue_data(self._files, parent, new)
        self._earlier, self._contents = continued.earlier, continued.contents
        rows = continued.data.manifest.rows
        self._reporter.event(
            "continued",
            f"Continues {parent.reference}: {continued.new_rows} new rows, {rows} in all.",
            parent=parent.reference,
            new_rows=continued.new_rows,
            rows=rows,
            replaced_rows=continued.replaced_rows,
            new_classes=sorted(set(continued.data.manifest.classes) - set(parent.labels)),
        )
        return continued.data

    def _trunk(self, train: Dataset, held_out: Dataset | None) -> Trunk:
        if self._request.model == AUTO:
            self._choose_backbone(train)
        if not is_allowed(self._request.model, self._settings.hf_models):
            raise DataError("this worker is not set up for the backbone", param="model")
        trunks = Candidates(
            lambda precision: self._open_trunk(precision, train),
            lambda trunk, data: self._extract(trunk, data, 0.05, 0.1),
            train,
            held_out,
        )
        trunk, choice = choose(self._request, trunks)
        self._choices = replace(self._choices, precision=choice)
        if choice is not None:
            self._reporter.event(
                "precision_chosen",
                f"Precision {choice.precision}: {choice.reason}.",
                **choice.model_dump(mode="json"),
            )
        return trunk

    def _open_trunk(self, precision: Precision, train: Dataset) -> Trunk:
        trunk = self._load_trunk(self._request.model, precision)
        if trunk.modality is not train.manifest.modality:
            raise DataError(
                f"{self._request.model} reads {trunk.modality}; the training file holds "
                f"{train.manifest.modality} rows",
                param="model",
            )
        return trunk

    def _load_trunk(self, model: str, precision: Precision) -> Trunk:
        return ensure_trunk(
            self._registry,
            model,
            precision=precision,
            hf_models=self._settings.hf_models,
            threads=1,  # `extract` runs one batch per thread
            max_pixels=self._settings.max_pixels,
            loaded=self._loaded_trunk,
            on_export=lambda: self._reporter.event(
                "stage",
                f"First use of {model} in {precision} here: exporting its trunk.",
                stage="trunk",
            ),
        )

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
        return Rows(data, self._extract(trunk, data, 0.55, 0.6), targets)

    def _inspect(self, rows: Rows, other: Rows | None, trunk: Trunk) -> DataReport:
        found = inspect_data(rows.row_set, rows.targets, other.row_set if other else None, trunk)
        summary = found.summary()
        level: EventLevel = "warn" if summary["leaked_rows"] else "info"
        self._reporter.event("data_report", describe(found), level=level, **summary)
        return found

    def _unfreeze(self, trunk: Trunk, train: Dataset, rows: Rows, fitted: Fit) -> Tuned | None:
        automatic = self._request.strategy == "auto"
        if not automatic and not trunk.manifest.slots:
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
        if automatic:
            prospect = decide(setting, trunk, backbone, train, fitted, rows.targets)
            self._choices = replace(self._choices, strategy=prospect)
            if not prospect.tune:
                return None
        tuned, self._steps = unfreeze(setting, trunk, backbone, train, rows.targets, rows.features)
        return tuned

    def _adapted(self, trunk: Trunk, tuned: Tuned, data: Dataset, labels: list[str]) -> Rows:
        """The validation file's rows as the tuned model sees them."""
        features = extract(
            trunk,
            data.items,
            threads=self._threads,
            on_progress=lambda *_: self._reporter.check(),
            deltas=tuned.deltas(trunk),
        )
        return Rows(data, features, data.targets(labels, param="validation_file"))

    def _evaluate(
        self, fitted: Fit, tuned: Tuned | None, rows: Rows, other: Rows | None, labels: list[str]
    ) -> Assessment:
        """On the validation file if there is one, or else on rows that the model has not seen."""
        held_out = None if other is None else (other.features, other.targets)
        alternative = None
        if tuned is not None:
            alternative = Alternative(tuned.head, tuned.held_out, tuned.probabilities)
        assessment = assess(fitted, rows.targets, labels, held_out, alternative)
        metrics = assessment.metrics
        source = SOURCES[assessment.source]
        self._reporter.event(
            "metrics",
            f"Accuracy {metrics.accuracy:.3f} ± {metrics.accuracy_error:.3f} {source}; "
            f"the most frequent class alone gives {metrics.majority_accuracy:.3f}.",
            level="info",
            **assessment.summary(),
        )
        return assessment

    def _gate(
        self, assessment: Assessment, judged: Rows, labels: list[str], trunk: Trunk
    ) -> tuple[Comparison | None, GateOutcome | None]:
        """What the quality gate says, if the request has one."""
        gate = self._request.quality_gate
        if gate is None:
            return None, None
        answers = [labels[n] for n in assessment.probabilities.argmax(axis=1)]
        manifest = judged.data.manifest
        if assessment.rows is not None:
            judged = judged.subset(assessment.rows)
        held_out = HeldOut(
            items=judged.data.items,
            features=judged.features,
            trunk=trunk.manifest.digest,
            labels=judged.data.labels,
            answers=answers,
            dataset=manifest.sha256 if self._request.validation_file is None else None,
        )

        def load(current: ModelManifest) -> tuple[Head, FloatArray]:
            its_trunk = Trunk.load(
                self._registry, current.trunk, threads=1, max_pixels=self._settings.max_pixels
            )
            head = Head.load(self._registry, current, its_trunk)
            features = extract(
                its_trunk,
                judged.data.items,
                threads=self._threads,
                on_progress=lambda *_: self._reporter.check(),
                deltas=its_trunk.bank.gather([head.adapter]),
            )
            return head, features

        comparison = None
        if gate.min_improvement_over_current is not None:
            comparison = compare_with_current(
                self._registry, self._files, self._job.tenant,
                model_name(self._job, self._request), held_out, load, self._contents,
            )  # fmt: skip
        return comparison, judge(gate, assessment.metrics.accuracy, comparison)

    def _investigate(
        self, rows: Rows, other: Rows | None, fitted: Fit, assessment: Assessment, trunk: Trunk
    ) -> Investigation:
        found = investigate(
            trunk.modality, rows.row_set, rows.targets, other.row_set if other else None, fitted,
            assessment, classes=assessment.probabilities.shape[1], seed=self._request.seed,
        )  # fmt: skip
        transfer = found.transfer
        if transfer.advice is not None:
            self._reporter.event(
                "transfer", transfer.advice, level="warn", **transfer.model_dump(exclude={"advice"})
            )
        return found

    def _export(
        self, trunk: Trunk, assessment: Assessment, tuned: Tuned | None, rows: Rows
    ) -> dict[str, bytes]:
        if tuned is None:
            return export_head(assessment.head, rows.features)
        backbone = backbones.load(self._request.model, self._settings.hf_models)
        return export_adapted(assessment.head, tuned.adapter, trunk, backbone)

    def _novelty(self, tuned: Tuned | None, rows: Rows, classes: int) -> Novelty:
        if tuned is None:
            return estimate_novelty(rows.features, rows.targets, classes, seed=self._request.seed)
        return estimate_tuned_novelty(tuned.features, rows.targets, classes, tuned.distances)

    def _release(self, manifest: ModelManifest) -> ModelManifest:
        """Promote what was published, if it is asked for and the quality gate lets it pass.

        Raises `QualityGateFailed` if it does not; the version stays.
        """
        self._checkpoints.drop_states()
        self._reporter.event(
            "published", f"Published as {manifest.reference}.", model=manifest.reference
        )
        gate = manifest.gate
        if gate is not None:
            numbers = gate.model_dump(mode="json", exclude={"passed"})
            if gate.passed:
                self._reporter.event("gate_passed", "The quality gate was passed.", **numbers)
            else:
                why = "; ".join(gate.reasons)
                message = f"{manifest.reference} is kept but not released: {why}"
                self._reporter.event("gate_failed", f"{message}.", level="warn", **numbers)
                if self._request.promote:
                    raise QualityGateFailed(message, param="quality_gate")
        if self._request.promote:
            self._registry.releases.promote(
                manifest, created_by=RELEASED_BY, reason=f"job {manifest.job}"
            )
        return manifest

    # -- what is written ---------------------------------------------------------------------

    def _draft(
        self,
        trunk: Trunk,
        train: Dataset,
        fitted: Fit,
        tuned: Tuned | None,
        assessment: Assessment,
        gate: GateOutcome | None,
    ) -> ModelManifest:
        if tuned is None:
            draft = self._manifest(trunk, train, fitted.strength, assessment.summary())
        else:
            draft = self._manifest(
                trunk, train, tuned.strength, assessment.summary(), tuned.adapter, tuned.blocks
            )
        remedy = fitted.remedy if tuned is None else "none"
        training = draft.training | {"imbalance_remedy": remedy}
        return draft.model_copy(update={"gate": gate, "training": training})

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
                file=train.file,
                sha256=train.manifest.sha256,
                rows=train.manifest.rows,
                earlier=self._earlier,
            ),
            parent=self._parent.reference if self._parent else None,
            training=self._request.model_dump(mode="json") | {"l2_strength": strength},
            metrics=metrics,
        )

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
    job: Job, store: ArtifactStore, settings: Settings, reporter: Reporter,
    trunk: Trunk | None = None,
) -> ModelManifest:  # fmt: skip
    """Run a `fine_tune` job; return what it published. `trunk` has been loaded, if it helps."""
    return FineTune(job, store, settings, reporter, trunk).run()


def model_name(job: Job, request: FineTuneRequest) -> str:
    """The name under which a job publishes: its suffix, or one made of the job's id."""
    return request.suffix or f"model-{job.id.rsplit('-', 1)[-1][:12]}"
