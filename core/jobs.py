"""Jobs as both processes see them: statuses, records, events, and what a caller may ask for.

A *job* is anything that waits in the queue: `fine_tune` (a person's request) or `ingest` (the
parsing of one uploaded file). Both have the same life:

    validating_files ──▶ queued ──▶ running ──▶ succeeded | failed | cancelled

It may be `paused` from any of the first three, and goes back to `queued` (or to
`validating_files`, if its files are not ready) when it is resumed.

Statuses are those of the OpenAI fine-tuning API. Not here: how far a job is and how long it takes
(core.outlook), how it is kept (core.queue), what it does (training.pipeline), how it looks over
HTTP (service.api.jobs).
"""

from __future__ import annotations

import unicodedata
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)

from core.identifiers import Identifier
from core.outlook import Estimate, Progress

Json = dict[str, JsonValue]
EventLevel = Literal["info", "warn", "error"]


class JobKind(StrEnum):
    """What a job does; each kind has its own line in the queue and its own child process."""

    INGEST = "ingest"
    FINE_TUNE = "fine_tune"


class JobStatus(StrEnum):
    """Where a job is in its life."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """True for the three statuses that nothing leaves."""
        return self in TERMINAL


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


class StopReason(StrEnum):
    """Why a running job is to stop: for good, until it is resumed, or for another worker."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RELEASE = "release"


class Failure(BaseModel, frozen=True):
    """Why a job failed: a stable `code` of `core.errors`, a sentence, and the input at fault."""

    code: str
    message: str
    param: str | None = None


class JobEvent(BaseModel, frozen=True):
    """One line of a job's history. `id` orders the events of one job; `created_at` is Unix time."""

    id: str
    created_at: float
    type: str
    level: EventLevel = "info"
    message: str
    data: Json = Field(default_factory=dict)


def event_order(event_id: str) -> tuple[int, int]:
    """Return an event's id as numbers that compare as the events of a job do."""
    milliseconds, _, count = event_id.partition("-")
    return int(milliseconds), int(count)


class Once(BaseModel, frozen=True):
    """How a repeated request is known, so that it gets the job that the first one made.

    `name` is what repeats and `digest` is of the whole request: the same name with another digest
    is refused. The first request is remembered for `seconds`.

    One that is no `is_repeat` makes a job of its own and is remembered in place of the one before;
    but when its own repeat, sent later, has come through first, it gets that one's job.
    `age_seconds` tells: it is how long ago the request arrived.
    """

    name: str = Field(pattern=r"^[a-z0-9-]{1,100}$")
    digest: str
    seconds: int = Field(ge=1)
    is_repeat: bool = True
    age_seconds: float = Field(default=0, ge=0)


class NewJob(BaseModel, frozen=True):
    """A job to enqueue. `after` names jobs of the same tenant that must have succeeded first."""

    tenant: Identifier
    id: Identifier
    kind: JobKind
    spec: Json
    priority: int = Field(default=0, ge=-100, le=100)
    after: tuple[Identifier, ...] = ()
    once: Once | None = None
    estimate: Estimate | None = None


class Job(BaseModel, frozen=True):
    """A job's record. Times are Unix seconds; `attempt` counts claims and is the fencing token.

    `started_at` is of the first claim, `claimed_at` of the last. `ran_seconds` is what its attempts
    have run in all, up to the last heartbeat; waits and pauses do not count. `publishing` is true
    from the moment that an attempt may publish until it is known whether one has. `keep_best` is
    what the one who cancelled wants: that the best checkpoint stays.
    """

    tenant: str
    id: str
    kind: JobKind
    status: JobStatus
    spec: Json
    priority: int = 0
    attempt: int = 0
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    claimed_at: float | None = None
    ran_seconds: float = Field(default=0, ge=0)
    cancel_requested: bool = False
    pause_requested: bool = False
    keep_best: bool = False
    publishing: bool = False
    worker: str | None = None
    estimate: Estimate | None = None
    progress: Progress | None = None
    result: Json | None = None
    error: Failure | None = None


class Hyperparameters(BaseModel):
    """OpenAI's hyperparameters, for `gradual` and `full`; `feature_extraction` needs none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=100)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] = "auto"


class EarlyStopping(BaseModel):
    """`gradual` and `full` end a training after so many epochs without a lower held-out loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patience: int = Field(default=10, ge=1, le=100)


class Supervised(BaseModel):
    """The `supervised` method's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(BaseModel):
    """The training method; only `supervised` exists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["supervised"] = "supervised"
    supervised: Supervised = Supervised()


class QualityGate(BaseModel):
    """What a new version must reach to be promoted, in accuracy on held-out rows.

    A row of several labels is answered rightly if all of them are; values have no accuracy.

    `min_improvement_over_current` is a difference; -0.01 allows one point less than the version in
    production. A model's first version has nothing to improve on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    min_improvement_over_current: Annotated[float, Field(ge=-1, le=1)] | None = None

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if self.min_accuracy is None and self.min_improvement_over_current is None:
            raise ValueError("give min_accuracy, min_improvement_over_current or both")
        return self


def _all_different(labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    # As the labels of an upload are kept.
    labels = tuple(unicodedata.normalize("NFC", label) for label in labels)
    if len(set(labels)) < len(labels):
        raise ValueError("every class is to be named once")
    return labels


ClassName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class FineTuneRequest(BaseModel):
    """The body of `POST /v1/fine_tuning/jobs`, and the `spec` of a `fine_tune` job.

    `model` is a backbone id (`minilm`, `efficientnet-lite0`, `hf:<allowed entry>`), a version to
    continue, such as `support-intents@3`, or `auto`: the job compares the backbones that read its
    data. With `strategy` `auto`, it decides whether tuning the backbone can pay. `order` names all
    classes from the lowest to the highest, and makes the task ordinal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    training_file: Identifier
    validation_file: Identifier | None = None
    suffix: Identifier | None = None
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)
    order: Annotated[
        tuple[ClassName, ...] | None,
        Field(min_length=3, max_length=1000),
        AfterValidator(_all_different),
    ] = None
    method: Method = Method()
    strategy: Literal["auto", "feature_extraction", "gradual", "full"] = "feature_extraction"
    early_stopping: EarlyStopping = EarlyStopping()
    precision: Literal["auto", "fp32", "int8"] = "fp32"
    max_seconds: int = Field(default=3600, ge=1, le=86_400)
    promote: bool = True
    quality_gate: QualityGate | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    hyperparameters: Hyperparameters | None = None
    integrations: list[Any] | None = Field(default=None, max_length=0)

    @property
    def chosen_hyperparameters(self) -> Hyperparameters:
        """Where OpenAI's clients put them: in the method, or, as older ones do, beside it."""
        return self.hyperparameters or self.method.supervised.hyperparameters
