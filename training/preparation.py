"""What a job works on: its rows, the trunk that reads them, and their features.

    read ──▶ refuse what cannot be done ──▶ (continue a model) ──▶ (choose a backbone) ──▶ trunk

Whatever the request left open and is settled here, is settled in `request` and told in `decisions`.
Not here: what is learned from the features (training.pipeline).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from core.adapters import Deltas
from core.backbones import AUTO, candidates, is_allowed
from core.datasets import Task
from core.errors import DataError, NotFound
from core.files import FileStore
from core.jobs import EventLevel, FineTuneRequest, Job
from core.manifests import ModelManifest, Precision
from core.parents import find_parent
from core.preprocessing import FloatArray
from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from core.tasks import find_mismatch, find_refusal, task_of
from core.trunk import Trunk
from training import decisions
from training.backbone_choice import choose_backbone
from training.data import Dataset, Targets, read_dataset
from training.data_report import RowSet
from training.decisions import Decisions
from training.feature_cache import FeatureCache
from training.features import extract
from training.lineage import continue_data
from training.precision import Candidates, choose
from training.result_cache import ResultCache
from training.stopping import Stoppable
from training.trunks import ensure_trunk, require_quantisable

T = TypeVar("T")


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
    """Features, float32 [n, dim], and the target of each row (training.data)."""

    data: Dataset
    features: FloatArray
    targets: Targets

    def subset(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """Some of the rows; the manifest stays that of the whole file."""
        items = [self.data.items[n] for n in numbers]
        answers = [self.data.answers[n] for n in numbers]
        data = replace(self.data, items=items, answers=answers)
        return Rows(data, self.features[numbers], self.targets[numbers])

    @property
    def row_set(self) -> RowSet:
        """The rows as reports see them."""
        values, spread = None, self.data.manifest.values
        if spread is not None:
            values = self.targets
        deviation = spread.deviation if spread else 0.0
        return RowSet(self.data.items, self.features, self.data.shown, values, deviation)


class Preparation:
    """Reads a job's data and opens its trunk.

    `parent` is the version that the job continues, `earlier` are its files and `contents` what was
    read of them (training.lineage).
    """

    def __init__(
        self, job: Job, store: ArtifactStore, settings: Settings, reporter: Reporter,
        threads: int, loaded_trunk: Trunk | None,
    ) -> None:  # fmt: skip
        self.request = FineTuneRequest.model_validate(job.spec)
        self.decisions = Decisions(reporter)
        self.parent: ModelManifest | None = None
        self.earlier: tuple[str, ...] = ()
        self.contents: dict[str, set[bytes]] = {}
        self._job = job
        self._store = store
        self._registry = Registry(store)
        self._files = FileStore(store, job.tenant)
        self._settings = settings
        self._reporter = reporter
        self._threads = threads
        self._loaded_trunk = loaded_trunk
        self.results = ResultCache(
            store,
            job.tenant,
            max_bytes=settings.feature_cache_bytes,
            max_days=settings.feature_cache_days,
        )

    def read(self) -> tuple[Dataset, Dataset | None]:
        """Return the training rows, with those of the parent, and the validation file's.

        Raises `DataError` naming what cannot be used, or not together.
        """
        train = read_dataset(self._files, self.request.training_file, param="training_file")
        self.parent = self._find_parent()
        if self.parent is not None:
            train = self._continue(self.parent, train)
        refusal = find_refusal(self.request, train.manifest)
        if refusal is not None:
            raise DataError(refusal.message, param=refusal.param)
        if self.request.validation_file is None:
            return train, None
        held_out = read_dataset(self._files, self.request.validation_file, param="validation_file")
        mismatch = find_mismatch(train.manifest, held_out.manifest)
        if mismatch is not None:
            raise DataError(mismatch, param="validation_file")
        return train, held_out

    def _find_parent(self) -> ModelManifest | None:
        model = self.request.model
        try:
            return find_parent(self._registry, self._job.tenant, model)
        except NotFound:
            raise DataError(f"{model} has been deleted", param="model") from None

    def task(self, train: Dataset) -> tuple[Task, list[str]]:
        """Return what the job learns, and the labels in the order of the head's outputs."""
        order = self.request.order
        task = task_of(train.manifest, order)
        return task, list(order) if order is not None else train.manifest.classes

    def trunk(self, train: Dataset, held_out: Dataset | None) -> Trunk:
        """Return the job's trunk, in the backbone and the precision that it asks for or chooses."""
        if self.request.model == AUTO:
            self._choose_backbone(train)
        if not is_allowed(self.request.model, self._settings.hf_models):
            raise DataError("this worker is not set up for the backbone", param="model")
        trunks = Candidates(
            lambda precision: self._open_trunk(precision, train),
            lambda trunk, data: self.extract(trunk, data, 0.05, 0.1),
            train,
            held_out,
        )
        trunk, choice = choose(self.request, trunks)
        if choice is not None:
            self.decisions.tell(decisions.precision(choice))
        return trunk

    def extract(self, trunk: Trunk, data: Dataset, begin: float, end: float) -> FloatArray:
        """Return the rows' features, from the cache where they are; progress goes to `end`."""

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

    def recall(self, what: str, kind: type[T], function: Callable[..., T], *arguments: object) -> T:
        """Return `function(*arguments)`, a `kind`, as an earlier job had it if one did, and say so.

        The function is pure: see `training.result_cache`.
        """
        result, is_old = self.results.recall(kind, function, *arguments)
        if is_old:
            self._reporter.event(
                "recalled", f"The {what} of an earlier job on the same data serves.", what=what
            )
        return result

    def tuned(self, trunk: Trunk, data: Dataset, deltas: Deltas | None) -> FloatArray:
        """Return the rows' features by what one model alone has tuned, which are not kept."""
        return extract(
            trunk,
            data.items,
            threads=self._threads,
            on_progress=lambda *_: self._reporter.check(),
            deltas=deltas,
        )

    def _continue(self, parent: ModelManifest, new: Dataset) -> Dataset:
        """From here on this is a job on the parent's backbone and on all rows so far."""
        self.request = self.request.model_copy(update={"model": parent.backbone})
        continued = continue_data(self._files, parent, new)
        self.earlier, self.contents = continued.earlier, continued.contents
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

    def _choose_backbone(self, train: Dataset) -> None:
        """Settle which backbone `auto` is, and go on as if the request had named it."""
        models = candidates(
            train.manifest.modality,
            self._settings.hf_models,
            to_tune=self.request.strategy != "feature_extraction",
        )

        def features(model: str, sample: Dataset) -> FloatArray | None:
            trunk = self._load_trunk(model, "fp32")
            if trunk.modality is not train.manifest.modality:
                return None
            if self.request.precision == "int8":
                require_quantisable(model, trunk.manifest.slots)
            return self.extract(trunk, sample, 0.05, 0.1)

        choice = choose_backbone(models, features, train, self.request.seed)
        self.decisions.tell(decisions.backbone(choice))
        self.request = self.request.model_copy(update={"model": choice.model})

    def _open_trunk(self, precision: Precision, train: Dataset) -> Trunk:
        trunk = self._load_trunk(self.request.model, precision)
        if trunk.modality is not train.manifest.modality:
            raise DataError(
                f"{self.request.model} reads {trunk.modality}; the training file holds "
                f"{train.manifest.modality} rows",
                param="model",
            )
        return trunk

    def _load_trunk(self, model: str, precision: Precision) -> Trunk:
        tell: Callable[[], None] = lambda: self._reporter.event(  # noqa: E731
            "stage", f"First use of {model} in {precision} here: exporting its trunk.",
            stage="trunk",
        )  # fmt: skip
        return ensure_trunk(
            self._registry,
            model,
            precision=precision,
            hf_models=self._settings.hf_models,
            threads=1,  # `extract` runs one batch per thread
            max_pixels=self._settings.max_pixels,
            loaded=self._loaded_trunk,
            on_export=tell,
        )
