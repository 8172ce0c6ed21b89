"""How good predictions are: the metrics of a report, in plain NumPy.

Every figure is of the probabilities as they will be served. Accuracy comes with its standard error
and with what the majority class alone would score, since on a few hundred rows both matter. Not
here: which rows are scored (training.fit gives out-of-fold probabilities for a cross-validation).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.preprocessing import FloatArray

_SMALLEST = 1e-7
"""A float32 softmax reaches zero; the logarithm of a smaller number would say nothing more."""


class ClassMetrics(BaseModel, frozen=True):
    """One class: how many rows are of it, how many were said to be, and how many are both."""

    label: str
    rows: int
    predicted: int
    correct: int
    precision: float
    recall: float
    f1: float


class Metrics(BaseModel, frozen=True):
    """Of `rows` predictions. `nll` is the mean negative log-likelihood in nats.

    `accuracy_error` is the binomial standard error, `majority_accuracy` what always answering the
    commonest class would give. `macro_f1` is over the classes that occur among the rows; a class
    that is never predicted has a precision of 0.
    """

    rows: int
    accuracy: float
    accuracy_error: float
    macro_f1: float
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
    # f1 = 2PR / (P + R) = 2 correct / (rows + predicted), which needs no care with zeros.
    f1 = 2 * correct / np.maximum(counts + predicted, 1)
    return Metrics(
        rows=rows,
        accuracy=accuracy,
        accuracy_error=float(np.sqrt(accuracy * (1 - accuracy) / rows)),
        macro_f1=float(f1[counts > 0].mean()),
        nll=float(-np.log(np.maximum(chosen, _SMALLEST)).mean()),
        majority_accuracy=float(counts.max() / rows),
        classes=tuple(
            ClassMetrics(
                label=label,
                rows=int(counts[i]),
                predicted=int(predicted[i]),
                correct=int(correct[i]),
                precision=float(correct[i] / max(predicted[i], 1)),
                recall=float(correct[i] / max(counts[i], 1)),
                f1=float(f1[i]),
            )
            for i, label in enumerate(labels)
        ),
    )
