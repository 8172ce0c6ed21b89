"""Labels that are likely wrong: confident learning (Northcutt, Jiang & Chuang 2021).

A class's threshold is the mean probability that its own rows give it. A row is in doubt when the
likeliest of the classes that reach their threshold is not the one it is labelled as: thus a class
that the model is never sure of is not accused as a whole. Rows are ranked by how far the suggested
label is ahead of the given one.

The probabilities must be of heads that were fitted without the row in question, or a wrong label
would vouch for itself. Not here: which rows look alike (training.duplicates).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from core.preprocessing import FloatArray
from training.fit import IntArray


class Doubt(NamedTuple):
    """A row, the class that is likelier than its label, and by how much (0 to 1)."""

    row: int
    suggested: int
    margin: float


def find_label_errors(out_of_fold: FloatArray, targets: IntArray) -> list[Doubt]:
    """Return the rows whose label is in doubt, the most doubtful first.

    `out_of_fold` is [n, classes]; a class with no row or one is never suggested nor doubted,
    because no head that left its row out can know it.
    """
    rows, width = out_of_fold.shape
    counts = np.bincount(targets, minlength=width)
    own = out_of_fold[np.arange(rows), targets].astype(np.float64)
    thresholds = np.bincount(targets, own, width) / np.maximum(counts, 1)
    thresholds[counts < 2] = np.inf
    confident = np.where(out_of_fold >= thresholds, out_of_fold, 0)
    suggested = confident.argmax(axis=1)
    in_doubt = (
        (confident[np.arange(rows), suggested] > own) & (suggested != targets)
        & (counts[targets] > 1)
    )  # fmt: skip
    found = np.flatnonzero(in_doubt)
    margins = out_of_fold[found, suggested[found]] - own[found]
    order = np.argsort(-margins, kind="stable")
    return [Doubt(int(found[n]), int(suggested[found[n]]), float(margins[n])) for n in order]
