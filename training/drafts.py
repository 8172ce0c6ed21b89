"""What a job writes of its model: the manifest's draft, and, once it is published, its release.

Not here: the files (training.export), how a draft becomes a version (core.registry), and what the
quality gate says (training.gate).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from core.adapters import Adapter
from core.datasets import Task
from core.errors import QualityGateFailed
from core.jobs import FineTuneRequest, Job, Json
from core.manifests import DatasetReference, Interval, ModelManifest
from core.registry import Registry
from core.tasks import THRESHOLD
from core.trunk import Trunk
from training.data import Dataset
from training.preparation import Reporter

RELEASED_BY = "fine_tune"


@dataclass(frozen=True)
class Origin:
    """What a model comes from, known before anything is fitted; `labels` are in output order.

    `earlier` are the files of the `parent` that it continues, if any.
    """

    job: Job
    request: FineTuneRequest
    trunk: Trunk
    train: Dataset
    task: Task
    labels: list[str]
    parent: ModelManifest | None
    earlier: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name that it is published under."""
        return model_name(self.job, self.request)


def draft(
    origin: Origin, strength: float, metrics: dict[str, float], *,
    adapter: Adapter | None = None, own: Trunk | None = None, blocks: int = 0,
    interval: Interval | None = None, training: Json | None = None,
) -> ModelManifest:  # fmt: skip
    """Return a manifest without a version and files; `training` is added to the request's.

    `own` is a trunk that is made for this model only.
    """
    data, trunk = origin.train, own or origin.trunk
    kind: Literal["linear", "low_rank", "full"] = "linear" if adapter is None else "low_rank"
    made_by = origin.request.model_dump(mode="json") | {"l2_strength": strength}
    return ModelManifest(
        tenant=origin.job.tenant,
        name=origin.name,
        version=0,
        kind="full" if own else kind,
        rank=0 if adapter is None else adapter.rank,
        blocks=blocks,
        job=origin.job.id,
        attempt=origin.job.attempt,
        created_at=time.time(),
        backbone=origin.request.model,
        trunk=trunk.manifest.digest,
        modality=trunk.modality,
        task=origin.task,
        dim=trunk.dim,
        labels=origin.labels,
        threshold=THRESHOLD if origin.task is Task.MULTI_LABEL else None,
        interval=interval,
        files={},
        dataset=DatasetReference(
            file=data.file,
            sha256=data.manifest.sha256,
            rows=data.manifest.rows,
            earlier=origin.earlier,
        ),
        parent=origin.parent.reference if origin.parent else None,
        training=made_by | (training or {}),
        metrics=metrics,
    )


def release(
    registry: Registry, manifest: ModelManifest, request: FineTuneRequest, reporter: Reporter
) -> ModelManifest:
    """Promote what was published, if it is asked for and the quality gate lets it pass.

    Raises `QualityGateFailed` if it does not; the version stays.
    """
    reporter.event("published", f"Published as {manifest.reference}.", model=manifest.reference)
    gate = manifest.gate
    if gate is not None:
        numbers = gate.model_dump(mode="json", exclude={"passed"})
        if gate.passed:
            reporter.event("gate_passed", "The quality gate was passed.", **numbers)
        else:
            why = "; ".join(gate.reasons)
            message = f"{manifest.reference} is kept but not released: {why}"
            reporter.event("gate_failed", f"{message}.", level="warn", **numbers)
            if request.promote:
                raise QualityGateFailed(message, param="quality_gate")
    if request.promote:
        registry.releases.promote(manifest, created_by=RELEASED_BY, reason=f"job {manifest.job}")
    return manifest


def model_name(job: Job, request: FineTuneRequest) -> str:
    """The name under which a job publishes: its suffix, or one made of the job's id."""
    return request.suffix or f"model-{job.id.rsplit('-', 1)[-1][:12]}"
