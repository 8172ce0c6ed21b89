"""Is one classifier better than another on rows that neither was fitted on?

The log-likelihood decides, row by row, for accuracy is too coarse on a few hundred rows; and of
calibrated probabilities, each row's with the temperature of folds that it is not in. What ships is
calibrated, and tuned features make a classifier so sure of itself that without a temperature it
would lose to a worse one. A gain counts if it is more than one standard error of the difference,
and not negligible.

A `Jury` is the rows that judge in one search. Not here: what is compared (training.gradual), the
temperature (training.calibration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from core.preprocessing import FloatArray
from training.calibration import cross_rescale
from training.fit import FOLDS, MANY_ROWS, Head, IntArray, deal, fold_count, path
from training.novelty import unseen_quantiles

NEGLIGIBLE = 0.005
"""Nats a row that are not worth deltas: nearly equal models differ by a sure next to nothing."""

FEW_ROWS = 300
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
    """Heads fitted without some rows, of the strength that those chose; `head` is the last fold's.

    `probabilities` [n, classes] are of the rows held out, fold by fold. `share` is the part of the
    deltas that their features have.
    """

    head: Head
    strength: float
    probabilities: FloatArray
    share: float = 1.0


@dataclass(frozen=True)
class Fold:
    """The numbers of rows to fit on, and of those that judge."""

    train: IntArray
    held_out: IntArray


class Jury:
    """The rows of a search that are held out, fold by fold, and what they say."""

    def __init__(
        self, targets: IntArray, classes: int, seed: int, twins: IntArray | None = None
    ) -> None:
        self.folds = split(targets, seed, twins)
        self.rows = np.concatenate([fold.held_out for fold in self.folds])
        self.truth = targets[self.rows]
        self._targets = targets
        self._classes = classes

    def judge(self, features: Sequence[FloatArray], share: float = 1.0) -> Judged:
        """Fit heads on each fold's features [n, dim] and return them as judged (`fit_apart`)."""
        judged = fit_apart(features, self._targets, self.folds, self._classes)
        return replace(judged, share=share)

    def choose(self, candidates: Sequence[Judged]) -> Judged:
        """Return the first that is within one standard error of the most likely."""
        found = [likelihoods(each.probabilities, self.truth) for each in candidates]
        most = max(found, key=lambda each: float(each.mean()))
        losses = [compare(most, each) for each in found]
        return next(
            each for each, loss in zip(candidates, losses, strict=True) if loss.mean <= loss.error
        )

    def accuracy(self, judged: Judged) -> float:
        """Return how many of the rows are answered right."""
        return float((judged.probabilities.argmax(axis=1) == self.truth).mean())

    def distances(self, features: Sequence[FloatArray]) -> FloatArray:
        """Return quantiles of how far the rows lie from the others (training.novelty)."""
        found = [
            unseen_quantiles(
                each[fold.train], self._targets[fold.train], each[fold.held_out], self._classes
            )
            for each, fold in zip(features, self.folds, strict=True)
        ]
        mean: FloatArray = np.mean(found, axis=0)
        return mean


def split(targets: IntArray, seed: int, twins: IntArray | None = None) -> tuple[Fold, ...]:
    """Return how rows judge each other, class by class, those of one of `twins` [n] together.

    Of fewer than `FEW_ROWS` every row judges once, by what was fitted on two rows in three: from a
    third of them no gain could be told from chance. Of more, one in three judges, and of many one
    in five, for every fold costs a training.
    """
    rows = len(targets)
    fold_of = deal(targets, FOLDS_OF_FEW_ROWS if rows < MANY_ROWS else FOLDS, seed, twins)
    folds = range(int(fold_of.max()) + 1 if rows < FEW_ROWS else 1)
    return tuple(Fold(np.flatnonzero(fold_of != f), np.flatnonzero(fold_of == f)) for f in folds)


def fit_apart(
    features: Sequence[FloatArray], targets: IntArray, folds: Sequence[Fold], classes: int
) -> Judged:
    """Fit heads, one for each fold, of the strength that suits the rows held out best.

    `features` [n, dim] are of all rows, for each fold by deltas that were trained on its rows. They
    make the trained rows look better than they are, and a cross-validation among those would choose
    too weak a strength. Without calibration the held-out rows would choose too strong a one, only
    to make up for the sureness.
    """
    truth = targets[np.concatenate([fold.held_out for fold in folds])]
    paths = [
        path(each[fold.train], targets[fold.train], classes)
        for each, fold in zip(features, folds, strict=True)
    ]
    best: Judged | None = None
    most = -np.inf
    for fitted in zip(*paths, strict=True):
        heads = [head for _, head in fitted]
        predicted = [
            head.predict(each[fold.held_out])
            for head, each, fold in zip(heads, features, folds, strict=True)
        ]
        judged = Judged(heads[-1], fitted[0][0], np.concatenate(predicted))
        likelihood = float(likelihoods(judged.probabilities, truth).mean())
        if likelihood > most:
            best, most = judged, likelihood
    assert best is not None  # a path has strengths
    return best


def likelihoods(probabilities: FloatArray, truth: IntArray) -> npt.NDArray[np.float64]:
    """Return each row's log-likelihood, [n], after calibration across folds."""
    fold_of = deal(truth, fold_count(len(truth)), seed=0)
    calibrated, _ = cross_rescale(probabilities, truth, fold_of)
    chosen = calibrated[np.arange(len(truth)), truth].astype(np.float64)
    return np.log(np.maximum(chosen, _SMALLEST))


def compare(after: npt.NDArray[np.float64], before: npt.NDArray[np.float64]) -> Gain:
    """Return what the `likelihoods` of the same rows gained."""
    gains = after - before
    return Gain(float(gains.mean()), float(gains.std() / np.sqrt(len(gains))))
