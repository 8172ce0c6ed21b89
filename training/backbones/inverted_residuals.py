"""Stacks of inverted residuals (MobileNetV2, Sandler et al. 2018, arXiv 1801.04381) as one module.

    pixels ─▶ stem ─▶ blocks ─▶ 1×1 convolution ─▶ mean over positions

MobileNetV2 and EfficientNet-Lite are the same network but for the table of stages, the batch
norm's epsilon, and which side of a picture a stride-2 convolution pads.

Not here: those tables, and preprocessing (mobilenet, efficientnet_lite).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from core.datasets import Modality
from core.files import sha256
from core.preprocessing import ImagePreprocess
from training.backbones import TorchBackbone
from training.backbones.sources import Source, unusable

STEM = 32
HEAD = 1280


@dataclass(frozen=True)
class Stage:
    """Blocks of one width; the first of them has the stride."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    blocks: int


@dataclass(frozen=True)
class Architecture:
    """What tells one network from another. `pads_end`: the odd pixel at stride 2 is at the end."""

    stages: Sequence[Stage]
    epsilon: float
    pads_end: bool

    def convolution(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1
    ) -> nn.Conv2d:
        """A convolution without bias that keeps the size, or at stride 2 halves an even one."""
        if self.pads_end:
            return EndPaddedConv2d(inputs, outputs, kernel, stride, groups)
        return nn.Conv2d(
            inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )

    def norm(self, channels: int) -> nn.BatchNorm2d:
        """A batch norm."""
        return nn.BatchNorm2d(channels, eps=self.epsilon)


class EndPaddedConv2d(nn.Conv2d):
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

    def __init__(self, kind: Architecture, stage: Stage, inputs: int, stride: int) -> None:
        super().__init__()
        width = inputs * stage.expansion
        self.widens = stage.expansion > 1
        self.skips = stride == 1 and inputs == stage.channels
        if self.widens:
            self.expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self.bn0 = kind.norm(width)
        self.depthwise_conv = kind.convolution(width, width, stage.kernel, stride, groups=width)
        self.bn1 = kind.norm(width)
        self.project_conv = nn.Conv2d(width, stage.channels, 1, bias=False)
        self.bn2 = kind.norm(stage.channels)
        self.relu = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn0(self.expand_conv(x))) if self.widens else x
        y = self.relu(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return cast(Tensor, x + y) if self.skips else cast(Tensor, y)


class Stem(nn.Module):
    """Pixels to the first block's input, at half their height and width."""

    def __init__(self, kind: Architecture) -> None:
        super().__init__()
        self.conv = kind.convolution(3, STEM, kernel=3, stride=2)
        self.bn = kind.norm(STEM)
        self.relu = nn.ReLU6()

    def forward(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.relu(self.bn(self.conv(pixels))))


class InvertedResiduals(nn.Module):
    """Pixels, float32 [n, 3, 224, 224], to pooled features, float32 [n, 1280]."""

    def __init__(self, kind: Architecture) -> None:
        super().__init__()
        self.stem = Stem(kind)
        self.blocks = nn.ModuleList()
        inputs = STEM
        for stage in kind.stages:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                self.blocks.append(InvertedResidual(kind, stage, inputs, stride))
                inputs = stage.channels
        self.conv_head = nn.Conv2d(inputs, HEAD, 1, bias=False)
        self.bn1 = kind.norm(HEAD)
        self.relu = nn.ReLU6()
        # The ImageNet classifier: loaded so that the checkpoint must fit exactly, never exported.
        self.fc = nn.Linear(HEAD, 1000)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        x = self.relu(self.bn1(self.conv_head(x)))
        return cast(Tensor, x.mean(dim=(2, 3)))


def load(
    source: Source, kind: Architecture, preprocess: ImagePreprocess, weights_sha256: str
) -> TorchBackbone:
    """Load the one packaged `.pth`; raise `DataError` if it is not the one that is pinned.

    Its tensors go to ours by their order, which is that of the layers: names differ.
    """
    weights = source.find(".pth")
    if len(weights) != 1 or sha256(weights[0].read_bytes()) != weights_sha256:
        raise unusable(f"the weights of {source.name} are not those that Graft was built for")
    state: dict[str, Any] = torch.load(weights[0], map_location="cpu", weights_only=True)
    module = InvertedResiduals(kind)
    module.load_state_dict(dict(zip(module.state_dict(), state.values(), strict=True)))
    return TorchBackbone(
        name=source.name,
        modality=Modality.IMAGE,
        dim=HEAD,
        module=module.eval().requires_grad_(False),
        preprocess=preprocess,
        tokenizer_json=None,
        digest=source.digest(),
    )
