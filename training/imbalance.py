"""Rare classes: leave them alone, weigh their rows, or adjust the logits; held-out rows decide.

    none                 the fit as it is: best when what is served is as imbalanced as the data
    balanced_weights     every class has the same weight in the loss, however few its rows
    logit_adjustment     logits minus the log of the class's share (Menon et al. 2021, post hoc)

A remedy is tried only where the largest class has `IMBALANCED` times the rows of the smallest, so
balanced data gives the same head, bit for bit, as if this module did not exist. It is taken only if
the macro-averaged F1 of held-out rows rises by more than one standard error: F1 counts what a rare
class wins in recall and what the others lose in precision, where a macro-averaged recall or
likelihood would prefer a remedy every time.

Not here: the fits (training.fit), and how what was taken is kept where the backbone is tuned
(training.objectives).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.preprocessing import FloatArray

Remedy = Literal["none", "balanced_weights", "logit_adjustment"]
IntArray = npt.NDArray[np.int64]

IMBALANCED = 3.0
_RESAMPLES = 100
_SMALLEST = 1e-7


class RemedyCandidate(BaseModel, frozen=True):
    """One remedy that was tried, and how the rows held out fared: a line of the report.

    `gain` is in macro F1 over doing nothing, `gain_error` its standard error over resampled rows.
    """

    remedy: Remedy
    accuracy: float
    macro_f1: float
    gain: float
    gain_error: float


class Trial(NamedTuple):
    """A remedy and what it gives for the held-out rows, [n, classes]."""

    remedy: Remedy
    out_of_fold: FloatArray


def is_imbalanced(targets: IntArray) -> bool:
    """Tell if the largest class has `IMBALANCED` times the rows of the smallest that has any."""
    counts = np.bincount(targets)
    counts = counts[counts > 0]
    return bool(counts.max() >= IMBALANCED * counts.min())


def row_weights(targets: IntArray, classes: int) -> FloatArray:
    """Return a weight per row, 1 on average, with which all classes weigh the same."""
    counts = np.bincount(targets, minlength=classes)
    weights = 1 / counts[targets]
    scaled: FloatArray = (weights * (len(targets) / weights.sum())).astype(np.float32)
    return scaled


def log_shares(targets: IntArray, classes: int) -> FloatArray:
    """Return the log of each class's share of the rows; a class without rows counts as one row."""
    counts = np.maximum(np.bincount(targets, minlength=classes), 1)
    shares: FloatArray = np.log(counts / counts.sum()).astype(np.float32)
    return shares


def adjust(probabilities: FloatArray, shares: FloatArray) -> FloatArray:
    """Return the probabilities whose logits are lowered by `shares`, the classes' log shares."""
    logits = np.log(np.maximum(probabilities, np.float32(_SMALLEST))) - shares
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    adjusted: FloatArray = odds / odds.sum(axis=1, keepdims=True)
    return adjusted


def choose_remedy(
    trials: Sequence[Trial], targets: IntArray, seed: int
) -> tuple[int, tuple[RemedyCandidate, ...]]:
    """Return which trial to take, the first being `none`, and how each fared."""
    width = trials[0].out_of_fold.shape[1]
    predictions = [trial.out_of_fold.argmax(axis=1) for trial in trials]
    draws = np.random.default_rng(seed).integers(0, len(targets), (_RESAMPLES, len(targets)))
    scores = [macro_f1(targets, predicted, width) for predicted in predictions]
    resampled = np.array(
        [[macro_f1(targets[draw], p[draw], width) for p in predictions] for draw in draws]
    )
    errors = (resampled - resampled[:, :1]).std(axis=0)
    candidates = tuple(
        RemedyCandidate(
            remedy=trial.remedy,
            accuracy=float((predicted == targets).mean()),
            macro_f1=score,
            gain=score - scores[0],
            gain_error=float(error),
        )
        for trial, predicted, score, error in zip(trials, predictions, scores, errors, strict=True)
    )
    better = [n for n, found in enumerate(candidates) if found.gain > max(found.gain_error, 1e-9)]
    return max(better, key=lambda n: candidates[n].gain, default=0), candidates


def macro_f1(targets: IntArray, predictions: IntArray, classes: int) -> float:
    """Return the mean F1 over the classes that occur among the rows."""
    counts = np.bincount(targets, minlength=classes)
    predicted = np.bincount(predictions, minlength=classes)
    correct = np.bincount(targets[predictions == targets], minlength=classes)
    f1 = 2 * correct / np.maximum(counts + predicted, 1)
    return float(f1[counts > 0].mean())
