"""Manifests: what an immutable artifact is, written last, so that a manifest implies its files.

Not here: where artifacts are kept and who may write them (core.registry).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from core.datasets import Modality, Task
from core.jobs import Json

JOB_PREFIX = "ftjob-"
"""What the ids of fine-tune jobs begin with, and checkpoint references leave out."""


GOLDEN_FILE = "golden.safetensors"
"""Inputs of a trunk or a head, and what torch gave for them."""

OWN_TRUNK = "own-"
"""What the files of a trunk that is one version's own are called with, among that one's files."""

Precision = Literal["fp32", "int8"]
"""What a trunk's linear layers compute in; int8 is dynamic (training.quantization)."""


class Slot(BaseModel, frozen=True):
    """A layer of a trunk that takes a low-rank delta; `block` counts from the bottom, from 0.

    `name` is the layer's path in the encoder that `transformers` or our own loader makes.
    """

    name: str
    block: int
    kind: Literal["linear", "convolution"]
    in_dim: int
    out_dim: int


class TrunkManifest(BaseModel, frozen=True):
    """An exported backbone. `files` maps names to SHA-256; `digest` is taken over all of them.

    Graph: the token or pixel inputs that `preprocess.json` names, to `features` [n, dim] float32.
    For each of `slots` it has two more inputs, which are empty unless they are fed, and one that
    says which row takes which delta (core.adapters).
    `blocks` is how many blocks the slots are spread over. `max_difference` is the largest absolute
    difference from torch that was found at export, with and without deltas.
    """

    format: Literal["graft-trunk-1"] = "graft-trunk-1"
    digest: str
    backbone: str
    backbone_digest: str
    modality: Modality
    dim: int
    precision: Precision
    files: dict[str, str]
    slots: tuple[Slot, ...] = ()
    blocks: int = 0
    max_difference: float
    created_at: float
    versions: dict[str, str] = Field(default_factory=dict)


class DatasetReference(BaseModel, frozen=True):
    """Which data a model was fitted on: `rows` in all, of `file` and of `earlier` ones.

    A model that continues another has that one's files as `earlier`, newest first.
    """

    file: str
    sha256: str
    rows: int
    earlier: tuple[str, ...] = ()


GateBasis = Literal["same_rows", "recorded"]


class GateOutcome(BaseModel, frozen=True):
    """What a quality gate said of a version, with its numbers.

    `improvement` is the new accuracy minus `current_accuracy`, that of the version which production
    named: on the same `rows`, or as it was `recorded` when every row is one it was fitted on.
    """

    passed: bool
    reasons: tuple[str, ...]
    min_accuracy: float | None
    accuracy: float
    min_improvement_over_current: float | None
    improvement: float | None
    current: str | None
    current_accuracy: float | None
    basis: GateBasis | None
    rows: int


class Interval(BaseModel, frozen=True):
    """How far from a regression's answers values are.

    A share `coverage` of new rows' values is within `half_width` of the answer, as far as they are
    like the rows held out.
    """

    half_width: float
    coverage: float


class ModelManifest(BaseModel, frozen=True):
    """One version of a fine-tuned model; `task` says what its head gives (core.tasks).

    `head.onnx`: `features` [n, dim] float32 to `probabilities` [n, classes] float32, in the order
    of `labels`, or to `value` [n, 1] of a regression, which has an `interval` and no labels.
    `GOLDEN_FILE` holds features and what torch gave for them. Labels whose probability reaches
    `threshold` are a multi-label model's answer.

    A `low_rank` head has an adapter besides (core.adapters) of rank `rank` on the top `blocks`
    blocks; its golden features are those of the trunk's golden rows, with the adapter. A `full`
    model has a trunk of its own, whose files are the version's, named with `OWN_TRUNK` before.

    With a `step` it is a checkpoint of its job (core.checkpoints), and `version` is 0.
    """

    format: Literal["graft-model-1"] = "graft-model-1"
    tenant: str
    name: str
    version: int
    kind: Literal["linear", "low_rank", "full"] = "linear"
    rank: int = 0
    blocks: int = 0
    job: str
    attempt: int
    created_at: float
    backbone: str
    trunk: str
    modality: Modality
    task: Task = Task.SINGLE_LABEL
    dim: int
    labels: list[str]
    threshold: float | None = None
    interval: Interval | None = None
    files: dict[str, str]
    dataset: DatasetReference
    training: Json
    metrics: dict[str, float]
    parent: str | None = None
    step: int | None = None
    gate: GateOutcome | None = None

    @property
    def reference(self) -> str:
        """The pinned model reference, such as `support-intents@3`, or a checkpoint's."""
        if self.step is None:
            return f"{self.name}@{self.version}"
        return f"{self.name}:ckpt-{self.job.removeprefix(JOB_PREFIX)}-{self.step}"

    @property
    def has_own_trunk(self) -> bool:
        """Whether nothing else runs on its trunk, which comes and goes with it."""
        return self.kind == "full"

    @property
    def width(self) -> int:
        """How many numbers the head gives for a row."""
        return len(self.labels) or 1

    @property
    def folder(self) -> str:
        """Where the files are, as the beginning of their keys."""
        if self.step is None:
            return f"{self.tenant}/models/{self.name}/versions/{self.version}"
        step = f"{self.step:06}-{self.attempt:04}"
        return f"{self.tenant}/runs/{self.job}/checkpoints/{step}"


class Share(BaseModel, frozen=True):
    """A version's part of a model's traffic; weights need not add up to anything."""

    model_config = ConfigDict(extra="forbid")

    version: int = Field(ge=1, le=999_999_999)
    weight: int = Field(ge=1, le=1_000_000)


class Guard(BaseModel, frozen=True):
    """When the service takes a release back by itself; a limit that is None is not looked at.

    `max_error_rate` is of the rows that a version of the release answered, `max_disagreement` of
    those that its shadow answered too; both are judged over `min_rows` rows of one version and one
    process at a time.
    """

    model_config = ConfigDict(extra="forbid")

    max_error_rate: float | None = Field(default=None, ge=0, lt=1)
    max_disagreement: float | None = Field(default=None, ge=0, lt=1)
    min_rows: int = Field(default=200, ge=1, le=1_000_000)


class ReleaseContent(BaseModel, frozen=True):
    """What a release says: which version answers, and which is tried beside it.

    `traffic` splits what asks for the production alias; empty, that alias' version has it all.
    `shadow` computes the same inputs unseen, after the answer.
    """

    aliases: dict[str, int]
    traffic: tuple[Share, ...] = ()
    shadow: int | None = None
    guard: Guard | None = None

    @property
    def versions(self) -> frozenset[int]:
        """Every version that the release names in some way."""
        others = () if self.shadow is None else (self.shadow,)
        return frozenset(
            (*self.aliases.values(), *(share.version for share in self.traffic), *others)
        )


class Release(ReleaseContent, frozen=True):
    """A step in a model's history: what holds from now on, who said so, and why."""

    format: Literal["graft-release-1"] = "graft-release-1"
    number: int
    created_at: float
    created_by: str
    reason: str
