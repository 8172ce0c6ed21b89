"""What is tuned of a backbone, and a classifier on its features, as a task for the trainer.

    activations at the cut ─▶ blocks with deltas ─▶ features ─▶ classifier ─▶ loss
    inputs                 ─▶ the whole backbone ─▶

Both are a `Part` with its `Rows`: deltas are here, everything is in training.whole. The classifier
starts as the one that was fitted on frozen features (LP-FT, Kumar et al. 2022, arXiv
2202.10054), so training begins where the frozen head ends. Few rows a class: a supervised
contrastive loss (Khosla et al. 2020, arXiv 2004.11362) over whole batches is added. Images: each
row comes as one of its views, and without a contrast a batch is mixed with itself (mix-up, Zhang et
al. 2018), above a cut in activations (Verma et al. 2019).

Not here: what differs between tasks (training.objectives), the loop (training.trainer), which cut
and when to stop (training.gradual).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional

from core.adapters import Adapter
from core.datasets import Modality
from core.manifests import Slot
from core.preprocessing import FloatArray
from training import deltas
from training.activations import Batch, Upper
from training.backbones import TorchBackbone
from training.data import Targets
from training.fit import Head, IntArray
from training.objectives import Objective
from training.trainer import Parameter

VALIDATION_ROWS = 64
SORTED_BATCHES = 8
CONTRAST_TEMPERATURE = 0.1
CONTRAST_GROUP = 4


class Regularisation(BaseModel, frozen=True):
    """What keeps deltas from learning rows by heart.

    `dropout` is before the classifier; `mixup` is the parameter of the Beta
    distribution, 0 for none; `contrast` the weight of the contrastive loss beside the other.
    """

    dropout: float = 0.1
    label_smoothing: float = 0.0
    mixup: float = 0.0
    contrast: float = 0.0


class Rows(Protocol):
    """Rows as a part takes them, and their targets (training.data)."""

    targets: Tensor

    def __len__(self) -> int:
        """Return how many there are."""

    def plain(self, row: int) -> Tensor:
        """Return a row as it is."""

    def draw(self, row: int) -> Tensor:
        """Return one of a row's views, drawn from torch's global generator."""

    def length(self, row: int) -> int:
        """Return how many tokens a text has."""

    def subset(self, rows: IntArray) -> Rows:
        """Return some of the rows."""


class CachedRows:
    """Activations of rows at a cut, [row][view], the first view being the row as it is."""

    def __init__(self, views: Sequence[Sequence[Tensor]], targets: Targets) -> None:
        self.views = views
        self.targets = torch.from_numpy(targets)

    def __len__(self) -> int:
        return len(self.views)

    def plain(self, row: int) -> Tensor:
        """Return a row as it is."""
        return self.views[row][0]

    def draw(self, row: int) -> Tensor:
        """Return one of a row's cached views."""
        return self.views[row][int(torch.randint(len(self.views[row]), ()))]

    def length(self, row: int) -> int:
        """Return how many tokens a text has."""
        return len(self.plain(row))

    def subset(self, rows: IntArray) -> CachedRows:
        """Return some of the rows."""
        return CachedRows([self.views[row] for row in rows], self.targets[rows].numpy())


class Part(Protocol):
    """What is trained of a backbone, up to its features.

    `rows_at_once` is how many rows it is trained on side by side; None if it makes no difference.
    """

    modality: Modality
    rows_at_once: int | None

    def __call__(self, batch: Batch) -> Tensor:
        """Return features, float32 [n, dim]."""

    def parameters(self) -> list[Parameter]:
        """Return what is trained, always in the same order."""

    def set_share(self, share: float) -> None:
        """Once it is trained, let this part of the change count.

        Half-way between a backbone before and after tuning lies one that is often better than
        both, and more so on rows unlike the training rows (WiSE-FT, Wortsman et al. 2022, arXiv
        2109.01903).
        """


P = TypeVar("P", bound=Part)


class DeltaPart:
    """Deltas on the slots from block `cut` up."""

    def __init__(
        self, backbone: TorchBackbone, slots: Sequence[Slot], cut: int, rank: int, *, seed: int
    ) -> None:
        self.modality = backbone.modality
        self.rows_at_once: int | None = None
        self._slots = [slot for slot in slots if slot.block >= cut]
        self._upper = Upper(backbone, cut).eval().requires_grad_(False)
        rank = min(rank, *(min(slot.in_dim, slot.out_dim) for slot in slots))
        torch.manual_seed(seed)
        deltas.inject(self._upper.encoder, self._slots, rank)

    def __call__(self, batch: Batch) -> Tensor:
        features: Tensor = self._upper(batch)
        return features

    def parameters(self) -> list[Parameter]:
        """Two tensors for each slot, all at one rate."""
        return [
            Parameter(name, tensor)
            for name, tensor in deltas.parameters(self._upper.encoder, self._slots)
        ]

    def set_share(self, share: float) -> None:
        """Let the adapter and the features have this part of the deltas that were trained."""
        deltas.scale(self._upper.encoder, self._slots, share)

    def adapter(self) -> Adapter:
        """The deltas as they are now."""
        return deltas.read(self._upper.encoder, self._slots)


class Tuning(Generic[P]):
    """Trains a `part` and a classifier; `validate` is the loss on `held_out` rows."""

    def __init__(
        self, part: P, objective: Objective, head: Head, train: Rows, held_out: Rows | None, *,
        batch_size: int, regularisation: Regularisation,
    ) -> None:  # fmt: skip
        self.part = part
        self._objective = objective
        self._output = head.output
        self._modality = part.modality
        self._train, self._held_out = train, held_out
        self._batch_size = batch_size
        self._regularisation = regularisation
        # The features' size is taken into the weights, so that one rate suits every backbone.
        self._scale = 1.0 / _length(self._features(train, np.arange(min(len(train), 64))))
        free = objective.free(head.weight)
        self._weight = nn.Parameter(torch.from_numpy(free.copy()) / self._scale)
        self._bias = nn.Parameter(torch.from_numpy(head.bias.copy()))

    # -- what the trainer asks ---------------------------------------------------------------

    def parameters(self) -> list[Parameter]:
        """The classifier's two tensors, and what the part has."""
        classifier = [Parameter("weight", self._weight), Parameter("bias", self._bias)]
        return [*classifier, *self.part.parameters()]

    def batches(self, seed: int) -> list[Tensor]:
        """Every row once, in random order.

        For the contrastive loss, rows of one class come in small groups, so that most have a mate.
        Texts of about one length lie together, to save padding.
        """
        numbers = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self._train), generator=numbers)
        groups = list(torch.split(order, 1))
        if self._regularisation.contrast:
            by_class = order[torch.argsort(self._train.targets[order], stable=True)]
            mates = torch.split(by_class, CONTRAST_GROUP)
            groups = [mates[i] for i in torch.randperm(len(mates), generator=numbers)]
        if self._modality is Modality.TEXT:
            stretch = max(1, SORTED_BATCHES * self._batch_size // len(groups[0]))
            starts = range(0, len(groups), stretch)
            groups = [
                group
                for start in starts
                for group in sorted(groups[start : start + stretch], key=self._longest)
            ]
        batches = list(torch.split(torch.cat(groups), self._batch_size))
        return [batches[i] for i in torch.randperm(len(batches), generator=numbers)]

    def loss(self, rows: Tensor) -> Tensor:
        """The objective's loss of a batch, and the contrastive one if there is one.

        Without that one, images are mixed: of a mixed row nobody can say whose mate it is.
        """
        settings = self._regularisation
        chosen = [self._train.draw(row) for row in rows.tolist()]
        batch, targets = Batch.of(chosen, self._modality), self._train.targets[rows]
        share = 1.0
        other = torch.arange(len(rows))
        if settings.mixup and not settings.contrast and self._modality is Modality.IMAGE:
            beta = torch.distributions.Beta(settings.mixup, settings.mixup)
            share = float(beta.sample())
            other = torch.randperm(len(rows))
            mixed = share * batch.hidden + (1 - share) * batch.hidden[other]
            batch = Batch(mixed, None)
        features = self.part(batch)
        logits = self._logits(functional.dropout(features, settings.dropout))
        smoothing = settings.label_smoothing
        loss = share * self._objective.loss(logits, targets, smoothing)
        if share < 1.0:
            loss = loss + (1 - share) * self._objective.loss(logits, targets[other], smoothing)
        if settings.contrast:
            loss = loss + settings.contrast * contrastive_loss(features, targets)
        return loss

    def validate(self) -> float | None:
        """Mean loss of the held-out rows by the classifier in training."""
        if self._held_out is None:
            return None
        rows = np.arange(len(self._held_out))
        with torch.no_grad():
            logits = self._logits(self._features(self._held_out, rows))
            return float(self._objective.loss(logits, self._held_out.targets, smoothing=0.0))

    # -- what comes of it --------------------------------------------------------------------

    def head(self) -> Head:
        """The classifier as it is now, on features as they come, and as it is served."""
        weight = self._objective.weight(self._weight.detach() * self._scale).numpy()
        bias = self._bias.detach().numpy().copy()
        return self._objective.serve(Head(weight.copy(), bias, self._output))

    def features(self, rows: Rows) -> FloatArray:
        """Features of rows, [n, dim], by the part as it is now."""
        array: FloatArray = self._features(rows, np.arange(len(rows))).numpy()
        return array

    def _features(self, rows: Rows, indices: IntArray) -> Tensor:
        """Without dropout, and texts of one length together."""
        order = torch.from_numpy(indices)
        if self._modality is Modality.TEXT:
            lengths = torch.tensor([rows.length(int(i)) for i in order])
            order = order[torch.argsort(lengths, stable=True)]
        found: list[Tensor] = []
        with torch.no_grad():
            at_once = self.part.rows_at_once
            # Without gradients about four times as many have room.
            for part in torch.split(order, 4 * at_once if at_once else VALIDATION_ROWS):
                views = [rows.plain(int(i)) for i in part]
                found.append(self.part(Batch.of(views, self._modality)))
        features = torch.cat(found)
        return features[torch.argsort(order)] if len(indices) == len(rows) else features

    def _longest(self, rows: Tensor) -> int:
        return max(self._train.length(row) for row in rows.tolist())

    def _logits(self, features: Tensor) -> Tensor:
        return (features * self._scale) @ self._objective.weight(self._weight) + self._bias


def contrastive_loss(features: Tensor, targets: Tensor) -> Tensor:
    """Return the supervised contrastive loss of a batch; 0 if no two rows are of one class.

    For each row, the mean log-probability of picking a row of its class among all others by the
    cosine of their features (Khosla et al. 2020, equation 2).
    """
    directions = functional.normalize(features, dim=1)
    similar = directions @ directions.T / CONTRAST_TEMPERATURE
    itself = torch.eye(len(targets), dtype=torch.bool)
    mates = (targets[:, None] == targets[None, :]) & ~itself
    logarithms = functional.log_softmax(similar.masked_fill(itself, float("-inf")), dim=1)
    counts = mates.sum(dim=1)
    picked = logarithms.masked_fill(~mates, 0.0).sum(dim=1)
    with_mates = counts > 0
    return -(picked[with_mates] / counts[with_mates]).sum() / len(targets)


def _length(features: Tensor) -> float:
    return float(features.square().sum(dim=1).mean().sqrt()) or 1.0
