"""What answers of `/v1` and of the operations look like, under OpenAI's names where it has some.

Nothing is validated with these at run time; they are what `/openapi.json` says, and tests hold live
answers against them, in which no field may be missing here. Those of `/v1/predict` are in
service.openapi.predictions, those of `/v2` in service.api.inference.messages.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from core.datasets import FileStatus, Modality, Task, ValueRange
from core.jobs import Failure, Hyperparameters, JobStatus, Method
from core.manifests import DatasetReference, Guard, Interval, Share
from core.outlook import Progress


class ErrorDetail(BaseModel):
    """`param` names the field at fault; `code` is stable. A dry run lists all `errors`."""

    message: str
    type: str
    param: str | None
    code: str | None
    errors: list[dict[str, Any]] = []
    error_count: int = 0


class Error(BaseModel):
    """What went wrong."""

    error: ErrorDetail


class FileDataset(BaseModel):
    """What was found in a processed file; `values` are those of a regression."""

    modality: Modality
    task: Task
    rows: int
    classes: int
    counts: dict[str, int]
    values: ValueRange | None = None


class File(BaseModel):
    """An upload, or what a job made."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: FileStatus
    status_details: str | None
    dataset: FileDataset | None = None
    errors: list[dict[str, Any]] | None = None
    error_count: int | None = None


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"]
    data: list[File]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: str
    deleted: Literal[True]


class FineTuningJob(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: JobStatus
    training_file: str
    validation_file: str | None
    hyperparameters: Hyperparameters
    method: Method
    seed: int
    metadata: dict[str, str]
    result_files: list[str]
    trained_tokens: int | None
    error: Failure | None
    suffix: str | None
    order: list[str] | None = None
    strategy: str
    precision: str
    priority: int
    max_seconds: int
    started_at: float | None
    attempt: int
    cancel_requested: bool
    pause_requested: bool = False
    stop_reason: str | None = None
    estimated_start: float | None = None
    progress: Progress | None
    queue_position: int | None
    metrics: dict[str, Any] | None
    report: str | None
    report_html: str | None


class FineTuningJobList(BaseModel):
    """A page of jobs, newest first."""

    object: Literal["list"]
    data: list[FineTuningJob]
    has_more: bool
    scanned_to: str | None = None


class JobEventObject(BaseModel):
    """A line of a job's history; `event` is the finer type."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    event: str
    data: dict[str, Any]


class JobEventList(BaseModel):
    """A page of events, newest first."""

    object: Literal["list"]
    data: list[JobEventObject]
    has_more: bool


class CheckpointList(BaseModel):
    """The checkpoints of a job."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Lineage(BaseModel):
    """What a version was made of."""

    job: str
    backbone: str
    trunk: str
    dataset: DatasetReference
    training: dict[str, Any]


class Model(BaseModel):
    """A backbone that jobs may start from, or a fine-tuned model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["backbone", "fine_tuned"]
    modality: Modality | None = None
    dim: int | None = None
    description: str | None = None
    license: str | None = None
    version: int | None = None
    versions: list[int] | None = None
    aliases: dict[str, int] | None = None
    traffic: list[Share] | None = None
    shadow: int | None = None
    served: bool | None = None
    loaded: bool | None = None
    refused: str | None = None
    task: Task | None = None
    labels: list[str] | None = None
    threshold: float | None = None
    interval: Interval | None = None
    metrics: dict[str, float] | None = None
    lineage: Lineage | None = None


class ModelList(BaseModel):
    """Every backbone and every fine-tuned model."""

    object: Literal["list"]
    data: list[Model]
    has_more: bool


class ModelFile(BaseModel):
    """A file that a model needs to answer; those of its trunk begin with `trunk/`."""

    id: str
    object: Literal["model.file"]
    bytes: int
    sha256: str


class ModelFileList(BaseModel):
    """All files of a model's version."""

    object: Literal["list"]
    model: str
    data: list[ModelFile]


class ModelRelease(BaseModel):
    """A step in a model's history."""

    object: Literal["model.release"]
    model: str
    number: int
    aliases: dict[str, int]
    traffic: list[Share]
    shadow: int | None
    guard: Guard | None
    created_at: float
    created_by: str
    reason: str


class ModelReleaseList(BaseModel):
    """Releases, newest first; the first one holds."""

    object: Literal["list"]
    data: list[ModelRelease]
    has_more: bool


class Live(BaseModel):
    """The process answers."""

    status: Literal["live"]


class Ready(BaseModel):
    """What the process serves."""

    status: Literal["ready"]
    models: int
    versions: int
    refused: int
    redis: Literal["connected", "away"]
