"""Several labels, and values, against models that know nothing beforehand, on the same rows.

As for classes (training.baselines): one that always says the same, and one fitted from scratch on
the words or pixels of the rows, on the same folds or training rows as the model. Rows are compared
one by one: sets of labels by their Jaccard index (the labels both have, of those either has; 1 for
two empty sets), values by their absolute error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.datasets import Modality
from core.preprocessing import FloatArray
from training import judgement
from training.baselines import (
    ALL_FOLDS_UP_TO,
    MAX_IMAGES,
    MAX_TEXTS,
    NETWORK,
    Items,
    Split,
    cut,
)
from training.fit import IntArray
from training.scratch import (
    predict_pixel_labels,
    predict_pixel_values,
    predict_word_labels,
    predict_word_values,
    read_pixels,
)

MAX_CELLS = 400_000
"""Texts times labels up to which a model is fitted from scratch for each label."""

_ERROR = "absolute error"

BoolArray = npt.NDArray[np.bool_]
DoubleArray = npt.NDArray[np.float64]


class Standing(BaseModel, frozen=True):
    """The model against others on the same `rows` held-out rows, by the mean `measure` of a row.

    `gain` is by how much the model is better than the one from scratch, whichever way the measure
    goes, and `gain_error` the standard error of the difference row by row. Without a model from
    scratch `helps` is None, and `skipped` says why there is none. `advice` is for a backbone that
    does not help (training.advice).
    """

    helps: bool | None
    measure: str
    rows: int
    model: float
    constant: float
    scratch: str
    scratch_score: float | None = None
    gain: float | None = None
    gain_error: float | None = None
    skipped: str | None = None
    advice: str | None = None

    @property
    def beats_constant(self) -> bool:
        """Whether the model is better than one that always says the same."""
        if self.measure == _ERROR:
            return self.model < self.constant
        return self.model > self.constant


def compare_labels(
    modality: Modality, items: Items, targets: FloatArray, said: BoolArray,
    *, train: IntArray | None, fold_of: IntArray, seed: int,
) -> Standing:  # fmt: skip
    """Judge answers `said` [n, labels] by the Jaccard index; see `training.baselines.compare`."""
    splits = _splits(modality, len(items), train, fold_of)
    judged = np.concatenate([held_out for _, held_out in splits])
    truth = targets >= 0.5
    sets, sizes = np.unique(truth if train is None else truth[train], axis=0, return_counts=True)
    known = Standing(
        helps=None,
        measure="Jaccard index",
        rows=len(judged),
        model=float(_jaccard(said[judged], truth[judged]).mean()),
        constant=float(_jaccard(sets[sizes.argmax()][None], truth[judged]).mean()),
        scratch=NETWORK
        if modality is Modality.IMAGE
        else "a logistic regression on TF-IDF of words for each label",
    )
    reason = _reason(modality, len(items))
    if reason is None and modality is Modality.TEXT and targets.size > MAX_CELLS:
        reason = f"not fitted for more than {MAX_CELLS:,} texts times labels"
    if reason is not None:
        return known.model_copy(update={"skipped": reason})
    if modality is Modality.IMAGE:
        pixels = read_pixels(cast("Sequence[bytes]", items))
        parts = [predict_pixel_labels(pixels, truth, *split, seed) for split in splits]
    else:
        texts = cast("Sequence[str]", items)
        parts = [predict_word_labels(texts, truth, *split) for split in splits]
    found = np.concatenate(parts)
    scores = _jaccard(said[judged], truth[judged]), _jaccard(found, truth[judged])
    return _compared(known, *scores, sign=1)


def compare_values(
    modality: Modality, items: Items, values: DoubleArray, said: DoubleArray,
    *, train: IntArray | None, fold_of: IntArray, seed: int,
) -> Standing:  # fmt: skip
    """Judge answers `said` [n] by the absolute error; see `training.baselines.compare`."""
    splits = _splits(modality, len(items), train, fold_of)
    judged = np.concatenate([held_out for _, held_out in splits])
    mean = float((values if train is None else values[train]).mean())
    errors = np.abs(said[judged] - values[judged])
    known = Standing(
        helps=None,
        measure=_ERROR,
        rows=len(judged),
        model=float(errors.mean()),
        constant=float(np.abs(mean - values[judged]).mean()),
        scratch=NETWORK if modality is Modality.IMAGE else "ridge regression on TF-IDF of words",
    )
    reason = _reason(modality, len(items))
    if reason is not None:
        return known.model_copy(update={"skipped": reason})
    if modality is Modality.IMAGE:
        pixels = read_pixels(cast("Sequence[bytes]", items))
        parts = [predict_pixel_values(pixels, values, *split, seed) for split in splits]
    else:
        texts = cast("Sequence[str]", items)
        parts = [predict_word_values(texts, values, *split) for split in splits]
    found = np.concatenate(parts)
    return _compared(known, errors, np.abs(found - values[judged]), sign=-1)


def _splits(
    modality: Modality, rows: int, train: IntArray | None, fold_of: IntArray
) -> list[Split]:
    all_folds = modality is Modality.TEXT and rows <= ALL_FOLDS_UP_TO
    return cut(rows, train, fold_of, all_folds=all_folds)


def _reason(modality: Modality, rows: int) -> str | None:
    most = MAX_TEXTS if modality is Modality.TEXT else MAX_IMAGES
    return f"not fitted on more than {most:,} rows" if rows > most else None


def _compared(known: Standing, model: DoubleArray, scratch: DoubleArray, *, sign: int) -> Standing:
    gain = judgement.compare(sign * model, sign * scratch)
    return known.model_copy(
        update={
            "helps": gain.mean > gain.error,
            "scratch_score": float(scratch.mean()),
            "gain": gain.mean,
            "gain_error": gain.error,
        }
    )


def _jaccard(said: BoolArray, truth: BoolArray) -> DoubleArray:
    both, either = (said & truth).sum(axis=1), (said | truth).sum(axis=1)
    scores: DoubleArray = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return scores
