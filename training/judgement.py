"""Is one classifier better than another on rows that neither was fitted on?

The log-likelihood decides, row by row, for accuracy is too coarse on a few hundred rows; and of
calibrated probabilities, each row's with the temperature of folds that it is not in. What ships is
calibrated, and tuned features make a classifier so sure of itself that without a temperature it
would lose to a worse one. A gain counts if it is more than one standard error of the difference,
and not negligible.

A `Jury` is the rows that judge in one search. Not here: what is compared (training.gradual), what a
row's likelihood is (training.objectives), the temperature (training.calibration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.preprocessing import FloatArray
from training.fit import FOLDS, MANY_ROWS, Head, IntArray, deal
from training.novelty import unseen_quantiles
from training.objectives import DoubleArray, Objective, Score

NEGLIGIBLE = 0.005
"""Nats a row that are not worth deltas: nearly equal models differ by a sure next to nothing."""

FEW_ROWS = 300
FOLDS_OF_FEW_ROWS = 3


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

    They are as they would be served.
    `outputs` [n, width] are of the rows held out, fold by fold. `share` is the part of the
    deltas that their features have.
    """

    head: Head
    strength: float
    outputs: FloatArray
    share: float = 1.0


@dataclass(frozen=True)
class Fold:
    """The numbers of rows to fit on, and of those that judge."""

    train: IntArray
    held_out: IntArray


class Jury:
    """The rows of a search that are held out, fold by fold, and what they say."""

    def __init__(self, objective: Objective, seed: int, twins: IntArray | None = None) -> None:
        self.folds = split(objective.groups, seed, twins)
        self.rows = np.concatenate([fold.held_out for fold in self.folds])
        self.truth = objective.targets[self.rows]
        self._objective = objective

    def judge(self, features: Sequence[FloatArray], share: float = 1.0) -> Judged:
        """Fit heads on each fold's features [n, dim] and return them as judged (`fit_apart`)."""
        return replace(fit_apart(features, self._objective, self.folds), share=share)

    def choose(self, candidates: Sequence[Judged]) -> Judged:
        """Return the first that is within one standard error of the most likely."""
        found = [self.likelihoods(each.outputs) for each in candidates]
        most = max(found, key=lambda each: float(each.mean()))
        losses = [compare(most, each) for each in found]
        return next(
            each for each, loss in zip(candidates, losses, strict=True) if loss.mean <= loss.error
        )

    def likelihoods(self, outputs: FloatArray) -> DoubleArray:
        """Return what each row says for a head that gave these `outputs` [n, width], in nats."""
        return self._objective.likelihoods(outputs, self.truth)

    def score(self, judged: Judged) -> Score:
        """Return how right the rows are answered."""
        return self._objective.score(judged.outputs, self.truth)

    def distances(self, features: Sequence[FloatArray]) -> FloatArray:
        """Return quantiles of how far the rows lie from the others (training.novelty)."""
        groups, count = self._objective.groups, self._objective.group_count
        found = [
            unseen_quantiles(each[fold.train], groups[fold.train], each[fold.held_out], count)
            for each, fold in zip(features, self.folds, strict=True)
        ]
        mean: FloatArray = np.mean(found, axis=0)
        return mean


def split(groups: IntArray, seed: int, twins: IntArray | None = None) -> tuple[Fold, ...]:
    """Return how rows judge each other, group by group, those of one of `twins` [n] together.

    Of fewer than `FEW_ROWS` every row judges once, by what was fitted on two rows in three: from a
    third of them no gain could be told from chance. Of more, one in three judges, and of many one
    in five, for every fold costs a training.
    """
    rows = len(groups)
    fold_of = deal(groups, FOLDS_OF_FEW_ROWS if rows < MANY_ROWS else FOLDS, seed, twins)
    folds = range(int(fold_of.max()) + 1 if rows < FEW_ROWS else 1)
    return tuple(Fold(np.flatnonzero(fold_of != f), np.flatnonzero(fold_of == f)) for f in folds)


def fit_apart(
    features: Sequence[FloatArray], objective: Objective, folds: Sequence[Fold]
) -> Judged:
    """Fit heads, one for each fold, of the strength that suits the rows held out best.

    `features` [n, dim] are of all rows, for each fold by deltas that were trained on its rows. They
    make the trained rows look better than they are, and a cross-validation among those would choose
    too weak a strength. Without calibration the held-out rows would choose too strong a one, only
    to make up for the sureness.
    """
    truth = objective.targets[np.concatenate([fold.held_out for fold in folds])]
    paths = [
        objective.path(each[fold.train], fold.train)
        for each, fold in zip(features, folds, strict=True)
    ]
    best: Judged | None = None
    most = -np.inf
    for fitted in zip(*paths, strict=True):
        heads = [objective.serve(head) for _, head in fitted]
        predicted = [
            head.predict(each[fold.held_out])
            for head, each, fold in zip(heads, features, folds, strict=True)
        ]
        judged = Judged(heads[-1], fitted[0][0], np.concatenate(predicted))
        likelihood = float(objective.likelihoods(judged.outputs, truth).mean())
        if likelihood > most:
            best, most = judged, likelihood
    assert best is not None  # a path has strengths
    return best


def compare(after: DoubleArray, before: DoubleArray) -> Gain:
    """Return what the `likelihoods` of the same rows gained."""
    gains = after - before
    return Gain(float(gains.mean()), float(gains.std() / np.sqrt(len(gains))))
