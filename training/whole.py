"""A whole backbone as what is tuned: every parameter of a copy of it, from inputs to features.

Rates fall from the features to the inputs (ULMFiT, Howard & Ruder 2018), and all are below the
classifier's, which alone was not pretrained. The copy stays in evaluation mode: batch norms keep
their statistics, which a few rows would spoil, and dropout is before the classifier only.

With nothing frozen there is nothing to cache. An image is decoded whenever it is looked at, so that
memory does not grow with the data, and an epoch draws one of its light augmentations anew
(training.views). Not here: the loss (training.tuning), when everything is tuned
(training.strategies).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from core.datasets import Modality
from core.preprocessing import (
    ImagePreprocessor,
    Prepared,
    PreparedImage,
    PreparedText,
    Preprocessor,
    TextPreprocess,
    TextPreprocessor,
)
from training.activations import Batch
from training.adaptable import find_blocks
from training.backbones import TorchBackbone
from training.data import Targets
from training.fit import IntArray
from training.trainer import Parameter
from training.views import IMAGE_VIEWS, Items, augment

TOP_RATE = 0.05
"""The rate of the topmost block, in rates of the classifier."""

BOTTOM_RATE = 0.3
"""The rate of what is below the blocks, in rates of the topmost."""

ROWS_AT_ONCE = {Modality.TEXT: 16, Modality.IMAGE: 4}
"""100 MB of activations an image, and as much for a text of 256 tokens, wait for their gradient."""


class WholePart:
    """A copy of a backbone in which everything is trained."""

    def __init__(self, backbone: TorchBackbone) -> None:
        self.modality = backbone.modality
        self.rows_at_once: int | None = ROWS_AT_ONCE[backbone.modality]
        self._backbone = backbone
        self._module = copy.deepcopy(backbone.module).eval().requires_grad_(True)
        self._trained: dict[str, Tensor] = {}

    def __call__(self, batch: Batch) -> Tensor:
        config = self._backbone.preprocess
        if batch.lengths is None or not isinstance(config, TextPreprocess):
            return cast(Tensor, self._module(batch.hidden))
        mask = torch.arange(batch.hidden.shape[1]) < batch.lengths[:, None]
        # Some encoders tell by the padding's id which positions count.
        ids = batch.hidden.masked_fill(~mask, config.pad_id)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "token_type_ids": torch.zeros_like(ids),
        }
        return cast(Tensor, self._module(*(inputs[name] for name in config.inputs)))

    def parameters(self) -> list[Parameter]:
        """Every parameter, at the rate of its depth."""
        named = list(self._module.named_parameters())
        depths = _depths([name for name, _ in named], self._backbone)
        deepest = max(depths, default=0) or 1
        return [
            Parameter(f"whole.{name}", tensor, TOP_RATE * BOTTOM_RATE ** (depth / deepest))
            for (name, tensor), depth in zip(named, depths, strict=True)
        ]

    def set_share(self, share: float) -> None:
        """Put the parameters this far from those of the backbone to those that were trained."""
        before = dict(self._backbone.module.named_parameters())
        with torch.no_grad():
            if not self._trained:
                self._trained = {n: p.clone() for n, p in self._module.named_parameters()}
            for name, parameter in self._module.named_parameters():
                parameter.copy_(torch.lerp(before[name], self._trained[name], share))

    def backbone(self) -> TorchBackbone:
        """Return the backbone as it is now; it is not to be trained on."""
        self._module.zero_grad(set_to_none=True)
        self._module.requires_grad_(False)
        return dataclasses.replace(self._backbone, module=self._module)


class ItemRows:
    """Rows as they came: texts as token ids, images as pixels that are decoded when looked at."""

    def __init__(
        self, preprocessor: Preprocessor, items: Sequence[Prepared] | Sequence[bytes],
        targets: Targets,
    ) -> None:  # fmt: skip
        self.targets = torch.from_numpy(targets)
        self._preprocessor = preprocessor
        self._items = items

    @classmethod
    def of(cls, preprocessor: Preprocessor, items: Items, targets: Targets) -> ItemRows:
        """Return the rows of a data set."""
        if isinstance(preprocessor, TextPreprocessor):
            texts = preprocessor.prepare_many(list(cast("Sequence[str]", items)))
            return cls(preprocessor, texts, targets)
        return cls(preprocessor, cast("Sequence[bytes]", items), targets)

    def __len__(self) -> int:
        return len(self._items)

    def plain(self, row: int) -> Tensor:
        """Return a text's ids [tokens], or an image's pixels [channels, height, width]."""
        return _tensor(self._prepared(row))

    def draw(self, row: int) -> Tensor:
        """Return an image mirrored, cut out, both or as it is."""
        prepared = self._prepared(row)
        if isinstance(prepared, PreparedText):
            return _tensor(prepared)
        view, seed = int(torch.randint(IMAGE_VIEWS, ())), int(torch.randint(2**31, ()))
        return _tensor(augment(prepared, view, np.random.default_rng(seed)))

    def length(self, row: int) -> int:
        """Return how many tokens a text has."""
        return self._prepared(row).cost

    def subset(self, rows: IntArray) -> ItemRows:
        """Return some of the rows."""
        items = [self._items[int(row)] for row in rows]
        return ItemRows(self._preprocessor, items, self.targets[rows].numpy())  # type: ignore[arg-type]

    def _prepared(self, row: int) -> Prepared:
        item = self._items[row]
        if not isinstance(item, bytes):
            return item
        assert isinstance(self._preprocessor, ImagePreprocessor)
        return self._preprocessor.prepare(item)


def largest_state_bytes(backbone: TorchBackbone) -> int:
    """Return what the state of a training takes: each parameter, the best one and two moments."""
    return sum(4 * tensor.nbytes for tensor in backbone.module.parameters())


def block_count(backbone: TorchBackbone) -> int:
    """Return how many blocks it has; one if it is not made of any."""
    found = find_blocks(backbone.encoder)
    return len(found[1]) if found else 1


def _depths(names: Sequence[str], backbone: TorchBackbone) -> list[int]:
    """Return how many blocks are above each parameter, and the one that it is in itself.

    What comes before the first block's parameters is below all, what comes after them above.
    """
    found = find_blocks(backbone.encoder)
    if found is None:
        return [0] * len(names)
    path, blocks = found
    prefix = f"{backbone.encoder_path}.{path}.".removeprefix(".")
    depths: list[int] = []
    below = True
    for name in names:
        if name.startswith(prefix):
            below = False
            block = int(name.removeprefix(prefix).partition(".")[0])
            depths.append(len(blocks) - 1 - block)
        else:
            depths.append(len(blocks) if below else 0)
    return depths


def _tensor(row: Prepared) -> Tensor:
    if isinstance(row, PreparedImage):
        return torch.from_numpy(np.ascontiguousarray(row.pixels))
    assert isinstance(row, PreparedText)
    return torch.tensor(row.ids, dtype=torch.int64)
