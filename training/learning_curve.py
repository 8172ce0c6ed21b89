"""Would more data help? The head refitted on a quarter and on half of the rows it was fitted on.

    25 % ── 50 % ── 100 % of the rows ──▶ the gain of the last doubling ──▶ that of the next

Every point is judged on the same held-out rows, so its gain over the one before has the small
standard error of paired rows. The strength is that of the chosen head, raised as the rows get
fewer, since a penalty stands for a prior whose weight does not grow with the data. The last point
is the fit itself and costs nothing.

The next doubling is expected to gain what the last did, shrunk by how much the last had shrunk from
the one before: a power law through three points, and never more than the last gain. More rows are
said to help if that is more than one standard error. Not here: the fit (training.fit).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.preprocessing import FloatArray
from training.fit import Fit, IntArray, fit_once

SHARES = (0.25, 0.5)
ALL_FOLDS_UP_TO = 2_000
"""Rows; with more, one fold is held out instead of each in turn."""


class Point(BaseModel, frozen=True):
    """Accuracy with `rows` rows to fit on, and its standard error."""

    rows: int
    accuracy: float
    error: float


class LearningCurve(BaseModel, frozen=True):
    """Accuracy by number of rows, all judged on the same `held_out` rows.

    `last_gain` is of the last doubling and `last_gain_error` its paired standard error;
    `next_gain` is what twice the rows would be expected to add.
    """

    held_out: int
    points: tuple[Point, ...]
    last_gain: float
    last_gain_error: float
    next_gain: float
    more_data_helps: bool


def learning_curve(
    features: FloatArray,
    targets: IntArray,
    classes: int,
    fitted: Fit,
    *,
    seed: int,
) -> LearningCurve:
    """Refit on parts of `features` [n, dim] and `targets` [n], the rows of `fitted`."""
    fold_of = fitted.fold_of
    folds = int(fold_of.max()) + 1 if len(targets) <= ALL_FOLDS_UP_TO else 1
    numbers = np.random.default_rng(seed)
    right: list[list[np.ndarray]] = [[] for _ in (*SHARES, 1.0)]
    sizes = np.zeros(len(right))
    for fold in range(folds):
        held_out = fold_of == fold
        # Shuffled and then dealt by class: every part of this order has all classes in proportion.
        train = numbers.permutation(np.flatnonzero(~held_out))
        train = train[np.argsort(_turn(targets[train]), kind="stable")]
        for place, share in enumerate(SHARES):
            part = train[: max(2, round(share * len(train)))]
            strength = fitted.strength * len(train) / len(part)
            head = fit_once(
                features[part], targets[part], classes, strength, fitted.remedy,
                is_ordered=fitted.is_ordered,
            )  # fmt: skip
            predicted = head.predict(features[held_out]).argmax(axis=1)
            right[place].append(predicted == targets[held_out])
            sizes[place] += len(part) / folds
        right[-1].append(fitted.out_of_fold[held_out].argmax(axis=1) == targets[held_out])
        sizes[-1] += len(train) / folds
    outcomes = [np.concatenate(parts).astype(np.float64) for parts in right]
    count = len(outcomes[0])
    first, last = (float((after - before).mean()) for before, after in pairwise(outcomes))
    error = float((outcomes[-1] - outcomes[-2]).std() / np.sqrt(count))
    shrinkage = min(1.0, last / first) if first > 0 else 0.0
    gain = max(0.0, last) * max(0.0, shrinkage)
    return LearningCurve(
        held_out=count,
        points=tuple(
            Point(
                rows=round(size),
                accuracy=float(values.mean()),
                error=float(values.std() / np.sqrt(count)),
            )
            for size, values in zip(sizes, outcomes, strict=True)
        ),
        last_gain=last,
        last_gain_error=error,
        next_gain=gain,
        more_data_helps=gain > error,
    )


def _turn(targets: IntArray) -> npt.NDArray[np.float64]:
    """Return for each row how many rows of its class come before it, as a share of its class."""
    order = np.argsort(targets, kind="stable")
    counts = np.bincount(targets)
    starts = np.cumsum(counts) - counts
    turn = np.empty(len(targets), np.float64)
    turn[order] = (np.arange(len(targets)) - starts[targets[order]]) / counts[targets[order]]
    return turn
