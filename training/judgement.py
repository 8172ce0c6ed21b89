"""Is one classifier better than another on rows that neither was fitted on?

The log-likelihood decides, row by row, for accuracy is too coarse on a few hundred rows; and of
calibrated probabilities, each row's with the temperature of folds that it is not in. What ships is
calibrated, and tuned features make a classifier so sure of itself that without a temperature it
would lose to a worse one. A gain counts if it is more than one standard error of the difference,
and not negligible.

Not here: what is compared (training.gradual), the temperature (training.calibration).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.preprocessing import FloatArray
from training.calibration import cross_rescale
from training.fit import FOLDS, MANY_ROWS, Head, IntArray, deal, fold_count, path

NEGLIGIBLE = 0.005
"""Nats a row that are not worth deltas: nearly equal models differ by a sure next to nothing."""

FOLDS_OF_FEW_ROWS = 3
_SMALLEST = 1e-7


@dataclass(frozen=True)
class Gain:
    """Mean log-likelihood of a row above another classifier's, in nats, and its standard error."""

    mean: float
    error: float

    @property
    def counts(self) -> bool:
        """True if it is sure enough, and large enough."""
        return self.mean > max(self.error, NEGLIGIBLE)


@dataclass(frozen=True)
class Judged:
    """A head fitted on some rows, with the strength that other rows chose.

    `probabilities` [n, classes] are of those others.
    """

    head: Head
    strength: float
    probabilities: FloatArray


def fit_apart(
    features: FloatArray, targets: IntArray, held_out: FloatArray, truth: IntArray, classes: int
) -> Judged:
    """Fit on features [n, dim] the head whose strength suits `held_out` rows [m, dim] best.

    For features that were trained on the fitted rows: these then look better than they are, and a
    cross-validation among them would choose too weak a strength. Without calibration the held-out
    rows would choose too strong a one, only to make up for the sureness.
    """
    best: Judged | None = None
    most = -np.inf
    for strength, head in path(features, targets, classes):
        judged = Judged(head, strength, head.predict(held_out))
        likelihood = float(likelihoods(judged.probabilities, truth).mean())
        if likelihood > most:
            best, most = judged, likelihood
    assert best is not None  # a path has strengths
    return best


def hold_out(targets: IntArray, seed: int) -> npt.NDArray[np.bool_]:
    """Return which rows judge the others, [n]: one in three of few rows, one in five of many.

    From 150 rows, a gain of two points cannot be told from chance.
    """
    folds = FOLDS_OF_FEW_ROWS if len(targets) < MANY_ROWS else FOLDS
    held_out: npt.NDArray[np.bool_] = deal(targets, folds, seed) == 0
    return held_out


def likelihoods(probabilities: FloatArray, truth: IntArray) -> npt.NDArray[np.float64]:
    """Return each row's log-likelihood, [n], after calibration across folds."""
    fold_of = deal(truth, fold_count(len(truth)), seed=0)
    calibrated, _ = cross_rescale(probabilities, truth, fold_of)
    chosen = calibrated[np.arange(len(truth)), truth].astype(np.float64)
    return np.log(np.maximum(chosen, _SMALLEST))


def compare(after: npt.NDArray[np.float64], before: npt.NDArray[np.float64] | None = None) -> Gain:
    """Return what the `likelihoods` of the same rows gained; nothing, without a `before`."""
    gains = after - (after if before is None else before)
    return Gain(float(gains.mean()), float(gains.std() / np.sqrt(len(gains))))
