"""The loss of a step of `gradual`, on activations that are features already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from core.datasets import Modality
from training.activations import Batch
from training.fit import Head
from training.objectives import Classes
from training.trainer import Parameter
from training.tuning import CachedRows, Regularisation, Tuning


class Glass:
    """A part that hands on what goes in, and remembers it."""

    modality = Modality.IMAGE
    rows_at_once: int | None = None

    def __init__(self) -> None:
        self.seen = torch.empty(0)

    def __call__(self, batch: Batch) -> Tensor:
        self.seen = batch.hidden
        return batch.hidden

    def parameters(self) -> Sequence[Parameter]:
        return []

    def set_share(self, share: float) -> None: ...


@pytest.mark.parametrize("contrast", [0.0, 1.0])
def test_images_are_mixed_unless_their_classes_are_contrasted(contrast: float) -> None:
    """A mixed row is of two classes, and the contrast would take it for one of the first."""
    rows, targets = np.eye(8, dtype=np.float32), np.arange(8) // 4
    part = Glass()
    task = Tuning(
        part, Classes(targets, 2), Head(np.ones((8, 2), np.float32), np.zeros(2, np.float32)),
        CachedRows([[torch.from_numpy(row)] for row in rows], targets), None, batch_size=8,
        regularisation=Regularisation(mixup=5.0, contrast=contrast),
    )  # fmt: skip
    torch.manual_seed(0)
    task.loss(torch.arange(8))
    mixed = (part.seen != torch.from_numpy(rows)).any(dim=1)
    assert int(mixed.sum()) == 0 if contrast else int(mixed.sum()) > 4
