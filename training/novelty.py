"""Statistics of the training rows by which a served model tells how novel an input is.

Distances are calibrated out of fold: a row's own class mean is taken without its fold, or every row
would seem nearer than the next one will be. What the numbers mean is core.novelty.
"""

from __future__ import annotations

import numpy as np

from core.novelty import QUANTILES, Novelty, nearest
from core.preprocessing import FloatArray
from training.fit import IntArray, deal, fold_count

_SMALLEST_SPREAD = 0.05
"""Of the mean spread: a feature that hardly varies in training must not decide alone."""

_LARGEST_MEAN = 60_000.0
"""What float16 can hold."""


def estimate_novelty(
    features: FloatArray, targets: IntArray, classes: int, *, seed: int
) -> Novelty:
    """Return the statistics of features [n, dim] whose classes are `targets` [n], n ≥ 2.

    A class without rows has a mean so far away that nothing is near it.
    """
    means, scale = _statistics(features, targets, classes)
    rows = features * scale
    fold_of = deal(targets, fold_count(len(targets)), seed)
    distances = np.empty(len(rows), np.float32)
    for fold in np.unique(fold_of):
        held_out = fold_of == fold
        rest = targets[~held_out]
        seen = _class_means(rows[~held_out], rest, classes)[np.unique(rest)]
        distances[held_out] = nearest(rows[held_out], seen)
    return _novelty(means, scale, _quantiles(distances))


def estimate_tuned_novelty(
    features: FloatArray, targets: IntArray, classes: int, quantiles: FloatArray
) -> Novelty:
    """Return the statistics of features [n, dim] by deltas that were trained on these very rows.

    Such rows lie nearer to their class than new ones will, in whatever folds, so what distances
    mean comes from rows that deltas trained in the same way had not seen: `unseen_quantiles`.
    """
    means, scale = _statistics(features, targets, classes)
    return _novelty(means, scale, quantiles)


def unseen_quantiles(
    seen: FloatArray, targets: IntArray, unseen: FloatArray, classes: int
) -> FloatArray:
    """Return the quantiles of the distances of `unseen` rows [m, dim] from those that were seen."""
    means, scale = _statistics(seen, targets, classes)
    present = means[np.unique(targets)] * scale
    return _quantiles(nearest(unseen * scale, present))


def _statistics(
    features: FloatArray, targets: IntArray, classes: int
) -> tuple[FloatArray, FloatArray]:
    """Return the means of the classes, and 1 / spread of each feature within them."""
    means = _class_means(features, targets, classes)
    spread = np.sqrt(np.square(features - means[targets]).mean(axis=0, dtype=np.float64))
    overall = features.std(axis=0, dtype=np.float64)
    # With one row in each class there is no spread within classes to see.
    spread = spread if spread.any() else overall
    floor = _SMALLEST_SPREAD * float(spread.mean()) or 1.0
    scale = (1 / np.maximum(spread, floor)).astype(np.float32)
    return means, scale


def _novelty(means: FloatArray, scale: FloatArray, quantiles: FloatArray) -> Novelty:
    return Novelty(
        means=np.clip(means * scale, -_LARGEST_MEAN, _LARGEST_MEAN).astype(np.float16),
        scale=scale,
        quantiles=quantiles,
    )


def _quantiles(distances: FloatArray) -> FloatArray:
    return np.quantile(distances, np.linspace(0, 1, QUANTILES)).astype(np.float32)


def _class_means(rows: FloatArray, targets: IntArray, classes: int) -> FloatArray:
    means = np.full((classes, rows.shape[1]), _LARGEST_MEAN, np.float32)
    for target in np.unique(targets):
        means[target] = rows[targets == target].mean(axis=0)
    return means
