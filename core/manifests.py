"""Manifests: what an immutable artifact is, written last, so that a manifest implies its files.

Not here: where artifacts are kept and who may write them (core.registry).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from core.datasets import Modality
from core.jobs import Json

JOB_PREFIX = "ftjob-"
"""What the ids of fine-tune jobs begin with, and checkpoint references leave out."""


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
    For each of `slots` it has two more inputs (core.adapters), which are empty unless they are fed.
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
    """Which data a model was fitted on."""

    file: str
    sha256: str
    rows: int


class ModelManifest(BaseModel, frozen=True):
    """One version of a fine-tuned model.

    `head.onnx`: `features` [n, dim] float32 to `probabilities` [n, classes] float32, in the order
    of `labels`. `golden.npz` holds features and the probabilities that torch gave for them.

    A `low_rank` head has an adapter besides (core.adapters) of rank `rank` on the top `blocks`
    blocks; its golden features are those of the trunk's golden rows, with the adapter.

    With a `step` it is a checkpoint of its job (core.checkpoints), and `version` is 0.
    """

    format: Literal["graft-model-1"] = "graft-model-1"
    tenant: str
    name: str
    version: int
    kind: Literal["linear", "low_rank"] = "linear"
    rank: int = 0
    blocks: int = 0
    job: str
    attempt: int
    created_at: float
    backbone: str
    trunk: str
    modality: Modality
    dim: int
    labels: list[str]
    files: dict[str, str]
    dataset: DatasetReference
    training: Json
    metrics: dict[str, float]
    step: int | None = None

    @property
    def reference(self) -> str:
        """The pinned model reference, such as `support-intents@3`, or a checkpoint's."""
        if self.step is None:
            return f"{self.name}@{self.version}"
        return f"{self.name}:ckpt-{self.job.removeprefix(JOB_PREFIX)}-{self.step}"

    @property
    def folder(self) -> str:
        """Where the files are, as the beginning of their keys."""
        if self.step is None:
            return f"{self.tenant}/models/{self.name}/versions/{self.version}"
        step = f"{self.step:06}-{self.attempt:04}"
        return f"{self.tenant}/runs/{self.job}/checkpoints/{step}"


class Release(BaseModel, frozen=True):
    """A step in a model's history: which version each alias names from now on."""

    format: Literal["graft-release-1"] = "graft-release-1"
    number: int
    aliases: dict[str, int]
    created_at: float
    created_by: str
    reason: str
