"""The slow parts of a report, side by side: what the fit alone does not tell.

Each part is pure, runs on one thread, and is bounded by row counts of its own, so that a report
takes a small share of its job; how long each took is in the report. Not here: the parts
(training.baselines, training.learning_curve), and what is quick enough to need no thread
(training.report).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field

from core.datasets import Modality
from core.preprocessing import FloatArray
from core.tasks import THRESHOLD
from training.assessment import Assessment
from training.baselines import Items, Transfer, compare
from training.convex import single_threaded
from training.data import Targets
from training.data_report import RowSet
from training.fit import Fit, IntArray
from training.learning_curve import LearningCurve, learning_curve
from training.multi_label import LabelAssessment
from training.regression import ValueAssessment
from training.yardsticks import Standing, compare_labels, compare_values

T = TypeVar("T")
Seconds = Annotated[dict[str, float], Field(exclude=True)]
"""Of what was computed: a finding that is kept (training.result_cache) is kept without."""


@dataclass(frozen=True)
class Investigation:
    """The findings of classes, and the seconds of each."""

    transfer: Transfer
    curve: LearningCurve
    seconds: Seconds = field(default_factory=dict)

    @property
    def yardstick(self) -> Transfer | Standing:
        """The comparison with models that know nothing, as of every task."""
        return self.transfer

    def advised(self, advice: str | None) -> Investigation:
        """Return the same with what to do about a backbone that does not help."""
        return replace(self, transfer=self.transfer.model_copy(update={"advice": advice}))


@dataclass(frozen=True)
class Comparison:
    """The finding of several labels, or of values, and its seconds."""

    standing: Standing
    seconds: Seconds = field(default_factory=dict)

    @property
    def yardstick(self) -> Transfer | Standing:
        """The comparison with models that know nothing, as of every task."""
        return self.standing

    def advised(self, advice: str | None) -> Comparison:
        """Return the same with what to do about a backbone that does not help."""
        return replace(self, standing=self.standing.model_copy(update={"advice": advice}))


@dataclass(frozen=True)
class _Judged:
    """All rows, held-out ones behind those to learn from; `answers` are to be read where judged."""

    items: Items
    targets: Targets
    answers: Targets
    learned: IntArray | None

    @classmethod
    def of(
        cls, train: RowSet, targets: Targets, validation: RowSet | None, truth: Targets,
        answers: Targets, rows: IntArray | None,
    ) -> _Judged:  # fmt: skip
        if validation is not None:
            # Those to learn from come first, whose own answers nobody asks for.
            items: list[Any] = [*train.items, *validation.items]
            unasked = np.zeros((len(targets), *answers.shape[1:]), answers.dtype)
            return cls(
                items, np.concatenate([targets, truth]), np.concatenate([unasked, answers]),
                np.arange(len(targets)),
            )  # fmt: skip
        if rows is None:
            return cls(train.items, targets, answers, None)
        everywhere = np.zeros((len(targets), *answers.shape[1:]), answers.dtype)
        everywhere[rows] = answers
        return cls(train.items, targets, everywhere, np.setdiff1d(np.arange(len(targets)), rows))


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
    correct = assessment.probabilities.argmax(axis=1) == assessment.targets
    judged = _Judged.of(train, targets, validation, assessment.targets, correct, assessment.rows)

    def baseline() -> Transfer:
        return compare(
            modality, judged.items, judged.targets, classes, judged.answers,
            train=judged.learned, fold_of=fitted.fold_of, seed=seed,
        )  # fmt: skip

    def curve() -> LearningCurve:
        return learning_curve(train.features, targets, classes, fitted, seed=seed)

    with single_threaded() as pool:
        transfer = pool.submit(_timed, seconds, "baselines", baseline)
        points = pool.submit(_timed, seconds, "learning_curve", curve)
        return Investigation(transfer.result(), points.result(), seconds)


def investigate_labels(
    modality: Modality, train: RowSet, targets: FloatArray, validation: RowSet | None,
    fitted: Fit, assessment: LabelAssessment, seed: int,
) -> Comparison:  # fmt: skip
    """Compare sets of labels with baselines."""
    said = assessment.outputs >= THRESHOLD
    judged = _Judged.of(train, targets, validation, assessment.targets, said, assessment.rows)
    return _compare(compare_labels, modality, judged, fitted, seed)


def investigate_values(
    modality: Modality, train: RowSet, targets: Targets, validation: RowSet | None,
    fitted: Fit, assessment: ValueAssessment, seed: int,
) -> Comparison:  # fmt: skip
    """Compare values with baselines."""
    said = assessment.outputs[:, 0].astype(np.float64)
    judged = _Judged.of(train, targets, validation, assessment.targets, said, assessment.rows)
    return _compare(compare_values, modality, judged, fitted, seed)


def _compare(
    yardstick: Callable[..., Standing], modality: Modality, judged: _Judged, fitted: Fit, seed: int
) -> Comparison:
    seconds: dict[str, float] = {}
    standing = _timed(
        seconds, "baselines",
        lambda: yardstick(
            modality, judged.items, judged.targets, judged.answers,
            train=judged.learned, fold_of=fitted.fold_of, seed=seed,
        ),
    )  # fmt: skip
    return Comparison(standing, seconds)


def _timed(seconds: dict[str, float], name: str, part: Callable[[], T]) -> T:
    begun = time.perf_counter()
    result = part()
    seconds[name] = round(time.perf_counter() - begun, 3)
    return result
