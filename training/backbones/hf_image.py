"""Image encoders in the Hugging Face layout: pooling, and the processor's settings as our data.

Pooled features are what the encoder's own parameter-free pooler gives (ResNet, ConvNeXt, Swin, and
DINOv2's normalised class token). A pooler with a dense layer (ViT) was trained for another task, or
not at all, so there the class token is taken, and without one the mean over positions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor, nn

from core.datasets import Modality
from core.preprocessing import ImagePreprocess
from training.backbones import TorchBackbone
from training.backbones.sources import Source, unusable

_WARPED_FROM = 384
"""ConvNeXt's processor crops below this size and resizes without cropping from it on."""

_RESAMPLE: dict[int, Literal["lanczos", "bilinear", "bicubic"]] = {
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}


class PooledImage(nn.Module):
    """`pixels`, float32 [n, 3, height, width], to features, float32 [n, dim]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        pooler = getattr(encoder, "pooler", None)
        self.dense_pooler = pooler is not None and any(
            isinstance(module, nn.Linear) for module in pooler.modules()
        )
        self.class_token = any(name.endswith("cls_token") for name, _ in encoder.named_parameters())

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.encoder(pixel_values=pixels)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is not None and not self.dense_pooler:
            return pooled.flatten(1)
        hidden: Tensor = output.last_hidden_state
        if hidden.dim() == 4:
            return hidden.mean(dim=(2, 3))
        return hidden[:, 0] if self.class_token else hidden.mean(dim=1)


def build(source: Source, encoder: nn.Module) -> TorchBackbone:
    """Make a backbone of a loaded image encoder; raise `DataError` if it has no processor."""
    preprocess = _preprocess(source)
    module = PooledImage(encoder).eval()
    try:
        with torch.inference_mode():
            features = module(torch.zeros(1, 3, *preprocess.crop))
    except (RuntimeError, ValueError, TypeError) as error:
        raise unusable("the model does not take the images that its processor makes") from error
    return TorchBackbone(
        name=source.name,
        modality=Modality.IMAGE,
        dim=int(features.shape[1]),
        module=module,
        preprocess=preprocess,
        tokenizer_json=None,
        digest=source.digest(),
        encoder_path="encoder",
    )


def _preprocess(source: Source) -> ImagePreprocess:
    try:
        loader: Any = transformers.AutoImageProcessor  # without annotations
        settings: dict[str, Any] = loader.from_pretrained(
            source.root, local_files_only=True, trust_remote_code=False
        ).to_dict()
    except Exception as error:
        # Many types, with paths in them, for files that are missing or unknown.
        raise unusable("the model has no image processor that can be read") from error
    try:
        resize, crop = _geometry(settings)
        mean, std = _scale(settings)
        return ImagePreprocess(
            resize=resize,
            crop=crop,
            resample=_RESAMPLE[settings["resample"]],
            reduced_decode=True,
            mean=mean,
            std=std,
        )
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise unusable("the model's image processor does what Graft cannot") from error


def _geometry(settings: dict[str, Any]) -> tuple[int | None, tuple[int, int]]:
    """Return the length of the shorter side (None: resize to the crop directly) and the crop."""
    if not settings["do_resize"]:
        raise ValueError("images of any size do not make a batch")
    size = settings["size"]
    crop_size = settings.get("crop_size") if settings.get("do_center_crop") else None
    if "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        if crop_size is not None:
            return edge, (int(crop_size["height"]), int(crop_size["width"]))
        if settings.get("crop_pct") is not None and edge < _WARPED_FROM:
            return int(edge / settings["crop_pct"]), (edge, edge)
        # Without a crop the width would vary; a square crop of the centre is the nearest thing.
        return (None if settings.get("crop_pct") is not None else edge), (edge, edge)
    height, width = int(size["height"]), int(size["width"])
    if crop_size is not None and crop_size != size:
        raise ValueError("resizing to a rectangle and then cropping it is not supported")
    return None, (height, width)


def _scale(
    settings: dict[str, Any],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation on values 0 to 255."""
    factor = float(settings["rescale_factor"]) if settings["do_rescale"] else 1.0
    normalises = settings["do_normalize"]
    means = [float(v) for v in settings["image_mean"]] if normalises else [0.0] * 3
    deviations = [float(v) for v in settings["image_std"]] if normalises else [1.0] * 3
    if settings.get("rescale_offset"):
        means = [value + 1 for value in means]
    if settings.get("include_top"):
        # EfficientNet's processor divides by the deviation twice.
        deviations = [value * value for value in deviations]
    red, green, blue = (value / factor for value in means)
    red_std, green_std, blue_std = (value / factor for value in deviations)
    return (red, green, blue), (red_std, green_std, blue_std)
