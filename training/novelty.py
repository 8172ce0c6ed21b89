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
    means = _class_means(features, targets, classes)
    spread = np.sqrt(np.square(features - means[targets]).mean(axis=0, dtype=np.float64))
    overall = features.std(axis=0, dtype=np.float64)
    # With one row in each class there is no spread within classes to see.
    spread = spread if spread.any() else overall
    floor = _SMALLEST_SPREAD * float(spread.mean()) or 1.0
    scale = (1 / np.maximum(spread, floor)).astype(np.float32)
    rows = features * scale
    fold_of = deal(targets, fold_count(len(targets)), seed)
    distances = np.empty(len(rows), np.float32)
    for fold in np.unique(fold_of):
        held_out = fold_of == fold
        rest = targets[~held_out]
        seen = _class_means(rows[~held_out], rest, classes)[np.unique(rest)]
        distances[held_out] = nearest(rows[held_out], seen)
    return Novelty(
        means=np.clip(means * scale, -_LARGEST_MEAN, _LARGEST_MEAN).astype(np.float16),
        scale=scale,
        quantiles=np.quantile(distances, np.linspace(0, 1, QUANTILES)).astype(np.float32),
    )


def _class_means(rows: FloatArray, targets: IntArray, classes: int) -> FloatArray:
    means = np.full((classes, rows.shape[1]), _LARGEST_MEAN, np.float32)
    for target in np.unique(targets):
        means[target] = rows[targets == target].mean(axis=0)
    return means
