"""Is the pretrained model worth it? The same rows, by models that know nothing beforehand.

Two baselines: the commonest class alone, and a model fitted from scratch on the rows as they are
(training.scratch). The second is fitted on the same folds, or the same training rows, as the model
and judged on the same held-out rows, so the two are compared row by row; the standard error of that
difference is far smaller than what two separate accuracies would allow.

Transfer *helps* when the model is right more often by more than one standard error. Where a
baseline would take longer than is decent it is left out, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.datasets import Modality
from training import judgement
from training.fit import IntArray
from training.scratch import predict_pixels, predict_words, read_pixels

MAX_TEXTS, MAX_IMAGES = 30_000, 3_000
ALL_FOLDS_UP_TO = 1_000
"""Texts up to which every fold is held out in turn; beyond it, and for images, the first alone."""

Items = Sequence[str] | Sequence[bytes]
BoolArray = npt.NDArray[np.bool_]
Split = tuple[IntArray, IntArray]

NETWORK = "a small convolutional network on 32×32 pixels"
_SCRATCH = {
    Modality.TEXT: "logistic regression on TF-IDF of words",
    Modality.IMAGE: NETWORK,
}


class Transfer(BaseModel, frozen=True):
    """The model against the baselines, all judged on the same `rows` held-out rows.

    `gain` is the model's accuracy minus that of the model from scratch, `gain_error` the standard
    error of their row by row difference. Without a model from scratch `helps` is None, and
    `skipped` says why there is none. `advice` is for a backbone that does not help
    (training.advice).
    """

    helps: bool | None
    rows: int
    model_accuracy: float
    majority_accuracy: float
    scratch: str
    scratch_accuracy: float | None = None
    gain: float | None = None
    gain_error: float | None = None
    skipped: str | None = None
    advice: str | None = None

    @property
    def beats_constant(self) -> bool:
        """Whether the model is right more often than the commonest class alone."""
        return self.model_accuracy > self.majority_accuracy


def compare(
    modality: Modality,
    items: Items,
    targets: IntArray,
    classes: int,
    correct: BoolArray,
    *,
    train: IntArray | None,
    fold_of: IntArray,
    seed: int,
) -> Transfer:
    """Judge the model against the baselines.

    `correct` [n] says of each row whether the model, not having been fitted on it, was right. With
    `train`, the other rows are held out; without, each fold of `fold_of` [n] is in turn.
    """
    all_folds = modality is Modality.TEXT and len(items) <= ALL_FOLDS_UP_TO
    splits = cut(len(items), train, fold_of, all_folds=all_folds)
    judged = np.concatenate([held_out for _, held_out in splits])
    commonest = np.bincount(targets if train is None else targets[train]).argmax()
    known = Transfer(
        helps=None,
        rows=len(judged),
        model_accuracy=float(correct[judged].mean()),
        majority_accuracy=float((targets[judged] == commonest).mean()),
        scratch=_SCRATCH[modality],
    )
    most = MAX_TEXTS if modality is Modality.TEXT else MAX_IMAGES
    if len(items) > most:
        return known.model_copy(update={"skipped": f"not fitted on more than {most:,} rows"})
    if modality is Modality.TEXT:
        texts = cast("Sequence[str]", items)
        found = [predict_words(texts, targets, *split) for split in splits]
    else:
        pixels = read_pixels(cast("Sequence[bytes]", items))
        found = [predict_pixels(pixels, targets, classes, *split, seed) for split in splits]
    scratch = np.concatenate(found) == targets[judged]
    gain = judgement.compare(correct[judged].astype(np.float64), scratch.astype(np.float64))
    return known.model_copy(
        update={
            "helps": gain.mean > gain.error,
            "scratch_accuracy": float(scratch.mean()),
            "gain": gain.mean,
            "gain_error": gain.error,
        }
    )


def cut(
    rows: int, train: IntArray | None, fold_of: IntArray, *, all_folds: bool
) -> list[Split]:  # fmt: skip
    """Return the rows to learn from and those to judge by: of the folds all, or the first alone."""
    if train is not None:
        return [(train, np.setdiff1d(np.arange(rows), train))]
    return [
        (np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold))
        for fold in range(int(fold_of.max()) + 1 if all_folds else 1)
    ]
