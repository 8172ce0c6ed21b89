"""Classes in order: an answer next to the right one is not as wrong as one far away.

The mean absolute error is in ranks; quadratic weighted kappa (Cohen 1968) is 1 for perfect answers
and 0 for those that chance would give, each error weighted by the square of its distance. Not here:
what is the same without an order (training.evaluation).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.preprocessing import FloatArray
from training.evaluation import RESAMPLES, Interval

IntArray = npt.NDArray[np.int64]


class OrdinalMetrics(BaseModel, frozen=True):
    """How far answers are from the right class, in ranks.

    `baseline_mae` is of always answering the median class. `confusion` has the rows by right class,
    and by answer within it.
    """

    mae: float
    mae_interval: Interval
    quadratic_kappa: float
    quadratic_kappa_interval: Interval
    baseline_mae: float
    confusion: tuple[tuple[int, ...], ...]

    def summary(self) -> dict[str, float]:
        """Return the numbers of a manifest."""
        return {
            "mae": self.mae,
            "quadratic_kappa": self.quadratic_kappa,
            "baseline_mae": self.baseline_mae,
        }

    def sentence(self) -> str:
        """Return the beginning of a sentence for the job's history."""
        return f"{self.mae:.3f} ranks off on average, kappa {self.quadratic_kappa:.3f}."


def evaluate_order(probabilities: FloatArray, targets: IntArray) -> OrdinalMetrics:
    """Score `probabilities` [n, classes] against ranks `targets` [n], n ≥ 1."""
    classes = probabilities.shape[1]
    said = probabilities.argmax(axis=1)
    cells = np.bincount(targets * classes + said, minlength=classes**2)
    ranks = np.arange(classes)
    distances = np.abs(ranks[:, None] - ranks[None, :])
    draws = np.random.default_rng(0).multinomial(len(targets), cells / len(targets), RESAMPLES)
    tables = [draw.reshape(classes, classes) for draw in draws]
    confusion = cells.reshape(classes, classes)
    return OrdinalMetrics(
        mae=float((confusion * distances).sum() / len(targets)),
        mae_interval=_interval([(t * distances).sum() / len(targets) for t in tables]),
        quadratic_kappa=_kappa(confusion, distances),
        quadratic_kappa_interval=_interval([_kappa(t, distances) for t in tables]),
        baseline_mae=float(np.abs(targets - np.floor(np.median(targets))).mean()),
        confusion=tuple(tuple(int(n) for n in line) for line in confusion),
    )


def _kappa(confusion: npt.NDArray[np.int64], distances: npt.NDArray[np.int64]) -> float:
    """Return 1 - observed / expected squared distance; 0 where chance could not err."""
    expected = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / confusion.sum()
    by_chance = float((expected * distances**2).sum())
    return 1 - float((confusion * distances**2).sum()) / by_chance if by_chance else 0.0


def _interval(values: list[float]) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
