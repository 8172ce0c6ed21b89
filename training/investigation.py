"""The slow parts of a report, side by side: what the fit alone does not tell.

Each part is pure, runs on one thread, and is bounded by row counts of its own, so that a report
takes a small share of its job; how long each took is in the report. Not here: the parts
(training.baselines, training.learning_curve), and what is quick enough to need no thread
(training.report).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from core.datasets import Modality
from training.assessment import Assessment
from training.baselines import Transfer, compare
from training.data_report import RowSet
from training.fit import Fit, IntArray, single_threaded
from training.learning_curve import LearningCurve, learning_curve

T = TypeVar("T")


@dataclass(frozen=True)
class Investigation:
    """The findings, and the seconds of each."""

    transfer: Transfer
    curve: LearningCurve
    seconds: dict[str, float]


def investigate(
    modality: Modality,
    train: RowSet,
    targets: IntArray,
    validation: RowSet | None,
    fitted: Fit,
    assessment: Assessment,
    *,
    classes: int,
    seed: int,
) -> Investigation:
    """Compare with baselines and draw the learning curve."""
    seconds: dict[str, float] = {}

    def timed(name: str, part: Callable[[], T]) -> T:
        begun = time.perf_counter()
        result = part()
        seconds[name] = round(time.perf_counter() - begun, 3)
        return result

    correct = assessment.probabilities.argmax(axis=1) == assessment.targets
    items, truth, learned = [*train.items], targets, None
    if validation is not None:
        # Held-out rows stand behind those to learn from, whose own answers nobody asks for.
        items = [*items, *validation.items]
        truth = np.concatenate([targets, assessment.targets])
        learned = np.arange(len(targets))
        correct = np.concatenate([np.zeros(len(targets), np.bool_), correct])

    elif assessment.rows is not None:
        learned = np.setdiff1d(np.arange(len(targets)), assessment.rows)
        everywhere = np.zeros(len(targets), np.bool_)
        everywhere[assessment.rows] = correct
        correct = everywhere

    def baseline() -> Transfer:
        return compare(
            modality, items, truth, classes, correct,
            train=learned, fold_of=fitted.fold_of, seed=seed,
        )  # fmt: skip

    def curve() -> LearningCurve:
        return learning_curve(train.features, targets, classes, fitted, seed=seed)

    with single_threaded() as pool:
        transfer = pool.submit(timed, "baselines", baseline)
        points = pool.submit(timed, "learning_curve", curve)
        return Investigation(transfer.result(), points.result(), seconds)
