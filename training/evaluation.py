"""How good predictions are: the metrics of a report, in plain NumPy.

Every figure is of the probabilities as they will be served. Accuracy comes with its standard error,
an interval, and with what the majority class alone would score, since on a few hundred rows all of
it matters. Intervals are of 95 %: Wilson's (1927) for accuracy, which holds near 0 and 1 too, and
percentiles of the bootstrap (Efron 1979) for macro F1. Not here: which rows are scored
(training.assessment), whether probabilities mean what they say (training.calibration).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.preprocessing import FloatArray

NORMAL_QUANTILE = 1.959964
RESAMPLES = 500
Interval = tuple[float, float]

_SMALLEST = 1e-7
"""A float32 softmax reaches zero; the logarithm of a smaller number would say nothing more."""


class ClassMetrics(BaseModel, frozen=True):
    """One class: how many rows are of it, how many were said to be, and how many are both.

    The intervals are Wilson's; of a class that no row is of, or none was said to be, all of 0 to 1.
    """

    label: str
    rows: int
    predicted: int
    correct: int
    precision: float
    precision_interval: Interval
    recall: float
    recall_interval: Interval
    f1: float

    @classmethod
    def of(cls, label: str, rows: int, predicted: int, correct: int, **more: Any) -> Self:
        """Score a class by its counts; `more` are fields of a subclass."""
        return cls(
            label=label,
            rows=int(rows),
            predicted=int(predicted),
            correct=int(correct),
            precision=float(correct / max(predicted, 1)),
            precision_interval=wilson(int(correct), int(predicted)),
            recall=float(correct / max(rows, 1)),
            recall_interval=wilson(int(correct), int(rows)),
            # 2PR / (P + R), which needs no care with zeros when it is written so.
            f1=float(2 * correct / max(rows + predicted, 1)),
            **more,
        )


class Metrics(BaseModel, frozen=True):
    """Of `rows` predictions. `nll` is the mean negative log-likelihood in nats.

    `accuracy_error` is the binomial standard error, `majority_accuracy` what always answering the
    commonest class would give. `macro_f1` is over the classes that occur among the rows; a class
    that is never predicted has a precision of 0.
    """

    rows: int
    accuracy: float
    accuracy_error: float
    accuracy_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    nll: float
    majority_accuracy: float
    classes: tuple[ClassMetrics, ...]

    def summary(self) -> dict[str, float]:
        """Return the numbers without the classes, for a manifest."""
        names = ("accuracy", "accuracy_error", "macro_f1", "nll", "majority_accuracy")
        return {name: float(getattr(self, name)) for name in names} | {"rows": float(self.rows)}


def evaluate(
    probabilities: FloatArray | npt.NDArray[np.float64],
    targets: npt.NDArray[np.int64],
    labels: Sequence[str],
) -> Metrics:
    """Score `probabilities` [n, classes] against class indices `targets` [n], n ≥ 1.

    `labels` names the columns. Among equal probabilities the first class is predicted.
    """
    rows, width = probabilities.shape
    if rows == 0 or targets.shape != (rows,) or width != len(labels):
        raise ValueError("probabilities, targets and labels do not agree in shape")
    predictions = probabilities.argmax(axis=1)
    counts = np.bincount(targets, minlength=width)
    predicted = np.bincount(predictions, minlength=width)
    correct = np.bincount(targets[predictions == targets], minlength=width)
    accuracy = float(correct.sum() / rows)
    chosen = probabilities[np.arange(rows), targets].astype(np.float64)
    f1 = 2 * correct / np.maximum(counts + predicted, 1)
    return Metrics(
        rows=rows,
        accuracy=accuracy,
        accuracy_error=float(np.sqrt(accuracy * (1 - accuracy) / rows)),
        accuracy_interval=wilson(int(correct.sum()), rows),
        macro_f1=float(f1[counts > 0].mean()),
        macro_f1_interval=macro_f1_interval(targets, predictions, width),
        nll=float(-np.log(np.maximum(chosen, _SMALLEST)).mean()),
        majority_accuracy=float(counts.max() / rows),
        classes=tuple(
            ClassMetrics.of(*each) for each in zip(labels, counts, predicted, correct, strict=True)
        ),
    )


def wilson(successes: int, trials: int) -> Interval:
    """Return the 95 % interval of a share (Wilson 1927); of no trials it is 0 to 1."""
    if not trials:
        return 0.0, 1.0
    z2 = NORMAL_QUANTILE**2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half *= NORMAL_QUANTILE / (1 + z2 / trials)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def macro_f1_interval(
    targets: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64], classes: int
) -> Interval:
    """Return the 95 % interval of macro F1 over `RESAMPLES` draws of as many rows.

    Rows with the same class and prediction are interchangeable, so their numbers are drawn. A class
    that a draw leaves out is left out of its mean.
    """
    cells, sizes = np.unique(targets * classes + predictions, return_counts=True)
    truth, said = np.divmod(cells, classes)
    draws = np.random.default_rng(0).multinomial(len(targets), sizes / len(targets), RESAMPLES)
    scores = np.empty(RESAMPLES)
    for place, draw in enumerate(draws):
        counts = np.bincount(truth, draw, classes)
        predicted = np.bincount(said, draw, classes)
        correct = np.bincount(truth, draw * (truth == said), classes)
        f1 = 2 * correct / np.maximum(counts + predicted, 1)
        scores[place] = f1[counts > 0].mean()
    low, high = np.quantile(scores, (0.025, 0.975))
    return float(low), float(high)
