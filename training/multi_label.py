"""Several labels a row: how good the answers are, and made to say how sure they are.

A label is given where its calibrated probability reaches `core.tasks.THRESHOLD`. The temperature is
one for all labels: each label of each row is a choice between two, calibrated as such
(training.calibration). Rows are judged as those of one class are (training.assessment). Figures
have intervals of 95 %. Not here: the fit (training.fit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel
from sklearn.metrics import average_precision_score

from core.preprocessing import FloatArray
from core.tasks import THRESHOLD
from training import decisions
from training.assessment import (
    MIN_CALIBRATION_ROWS,
    SOURCES,
    Alternative,
    Source,
    deal_rows,
)
from training.calibration import Calibration, calibration, cross_rescale, fold_into, rescale
from training.decisions import Decision
from training.evaluation import RESAMPLES, ClassMetrics, Interval, wilson
from training.fit import Fit, Head, IntArray
from training.strength import label_losses

BoolArray = npt.NDArray[np.bool_]
Numbers = npt.NDArray[Any]


class LabelMetrics(ClassMetrics, frozen=True):
    """One label: rows that have it, rows that were said to, and both; of the ranking, the area.

    `average_precision` is None for a label that all rows have, or none.
    """

    average_precision: float | None


class MultiLabelMetrics(BaseModel, frozen=True):
    """Of `rows` answers, each a set of labels.

    `accuracy` is the share of rows of which every label is right (subset accuracy), and
    `majority_accuracy` what always giving the commonest set would score. F1 is over all labels of
    all rows (micro), and the mean over labels that occur (macro). `mean_average_precision` is of
    the labels that some rows have and others have not. `nll` is in nats a row, all labels together.
    """

    rows: int
    accuracy: float
    accuracy_error: float
    accuracy_interval: Interval
    majority_accuracy: float
    micro_f1: float
    micro_f1_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    mean_average_precision: float
    labels_per_row: float
    nll: float
    threshold: float
    labels: tuple[LabelMetrics, ...]

    def summary(self) -> dict[str, float]:
        """Return the numbers without the labels, for a manifest."""
        names = (
            "accuracy", "accuracy_error", "majority_accuracy", "micro_f1", "macro_f1",
            "mean_average_precision", "nll",
        )  # fmt: skip
        return {name: float(getattr(self, name)) for name in names} | {"rows": float(self.rows)}


@dataclass(frozen=True)
class LabelAssessment:
    """The calibrated head, and how it did: `outputs` [n, labels] for `targets` [n, labels]."""

    head: Head
    source: Source
    metrics: MultiLabelMetrics
    calibration: Calibration
    outputs: FloatArray
    targets: FloatArray
    rows: IntArray | None = None

    @property
    def accuracy(self) -> float:
        """What a quality gate judges."""
        return self.metrics.accuracy

    def summary(self) -> dict[str, float]:
        """Return the figures of a manifest and of the `metrics` event."""
        return self.metrics.summary() | self.calibration.summary()

    def decisions(self) -> tuple[Decision, ...]:
        """Return what was decided on the rows that judge."""
        return (
            decisions.temperature(self.calibration),
            decisions.threshold(self.metrics.threshold),
        )

    def sentence(self) -> str:
        """Return one sentence for the job's history."""
        found = self.metrics
        return (
            f"Micro F1 {found.micro_f1:.3f}, macro F1 {found.macro_f1:.3f} {SOURCES[self.source]}; "
            f"every label is right in {100 * found.accuracy:.1f} % of the rows."
        )


def assess_labels(
    fitted: Fit, targets: FloatArray, labels: Sequence[str],
    validation: tuple[FloatArray, FloatArray] | None, alternative: Alternative | None = None,
) -> LabelAssessment:  # fmt: skip
    """Calibrate and judge a fit, or what was preferred to it, as `training.assessment.assess`.

    `targets` are [n, labels].
    """
    head, rows = fitted.head, None
    source: Source = "cross_validation"
    before, truth, fold_of = fitted.out_of_fold, targets, fitted.fold_of
    if alternative is not None:
        head, before = alternative.head, alternative.outputs
        truth, fold_of = targets[alternative.rows], deal_rows(len(alternative.rows))
        if len(alternative.rows) < len(targets):
            rows, source = alternative.rows, "held_out_rows"
    after, temperature = cross_calibrate(before, truth, fold_of)
    if validation is not None:
        features, truth = validation
        source, rows, before = "validation_file", None, head.predict(features)
        if len(truth) >= MIN_CALIBRATION_ROWS:
            after, temperature = cross_calibrate(before, truth, deal_rows(len(truth)))
        else:
            after = rescale(_pairs(before), temperature)[:, 1].reshape(before.shape)
    return LabelAssessment(
        head=fold_into(head, temperature),
        source=source,
        metrics=evaluate_labels(after, truth, labels),
        calibration=calibration(temperature, _pairs(before), _pairs(after), _choices(truth)),
        outputs=after,
        targets=truth,
        rows=rows,
    )


def evaluate_labels(
    probabilities: FloatArray, targets: FloatArray, labels: Sequence[str]
) -> MultiLabelMetrics:
    """Score `probabilities` [n, labels] against `targets` [n, labels] of 0 or 1, n ≥ 1."""
    truth, said = targets >= 0.5, probabilities >= THRESHOLD
    counts, predicted, correct = truth.sum(0), said.sum(0), (truth & said).sum(0)
    ranked = [
        float(average_precision_score(truth[:, i], probabilities[:, i]))
        if 0 < counts[i] < len(truth)
        else None
        for i in range(len(labels))
    ]
    known = [value for value in ranked if value is not None]
    exact = (truth == said).all(axis=1)
    _, sizes = np.unique(truth, axis=0, return_counts=True)
    accuracy = float(exact.mean())
    micro_interval, macro_interval = _f1_intervals(truth, said)
    return MultiLabelMetrics(
        rows=len(truth),
        accuracy=accuracy,
        accuracy_error=float(np.sqrt(accuracy * (1 - accuracy) / len(truth))),
        accuracy_interval=wilson(int(exact.sum()), len(truth)),
        majority_accuracy=float(sizes.max() / len(truth)),
        micro_f1=_micro_f1(correct, counts + predicted),
        micro_f1_interval=micro_interval,
        macro_f1=_macro_f1(correct, counts + predicted, counts),
        macro_f1_interval=macro_interval,
        mean_average_precision=float(np.mean(known)) if known else 0.0,
        labels_per_row=float(truth.sum() / len(truth)),
        nll=float(label_losses(probabilities, targets).mean()),
        threshold=THRESHOLD,
        labels=tuple(
            LabelMetrics.of(*each, average_precision=area)
            for *each, area in zip(labels, counts, predicted, correct, ranked, strict=True)
        ),
    )


def _f1_intervals(truth: BoolArray, said: BoolArray) -> tuple[Interval, Interval]:
    """Return the 95 % intervals of micro and macro F1 over draws of as many rows (Efron 1979)."""
    both, given = (truth & said).astype(np.float32), truth.astype(np.float32)
    sizes = given + said
    numbers = np.random.default_rng(0)
    micro, macro = np.empty(RESAMPLES), np.empty(RESAMPLES)
    for place in range(RESAMPLES):
        drawn = np.bincount(numbers.integers(0, len(truth), len(truth)), minlength=len(truth))
        weights = drawn.astype(np.float32)
        correct, total, counts = weights @ both, weights @ sizes, weights @ given
        micro[place] = _micro_f1(correct, total)
        macro[place] = _macro_f1(correct, total, counts)
    micro_low, micro_high, macro_low, macro_high = (
        float(np.quantile(scores, at)) for scores in (micro, macro) for at in (0.025, 0.975)
    )
    return (micro_low, micro_high), (macro_low, macro_high)


def _micro_f1(correct: Numbers, total: Numbers) -> float:
    return float(2 * correct.sum() / max(total.sum(), 1))


def _macro_f1(correct: Numbers, total: Numbers, counts: Numbers) -> float:
    f1 = 2 * correct / np.maximum(total, 1)
    return float(f1[counts > 0].mean()) if counts.any() else 0.0


def cross_calibrate(
    probabilities: FloatArray, targets: FloatArray, fold_of: IntArray
) -> tuple[FloatArray, float]:
    """Return rows scaled by the temperature of the other folds, and the temperature of all rows."""
    folds = np.repeat(fold_of, targets.shape[1])
    scaled, temperature = cross_rescale(_pairs(probabilities), _choices(targets), folds)
    return scaled[:, 1].reshape(probabilities.shape), temperature


def _pairs(probabilities: FloatArray) -> FloatArray:
    """Return each label of each row as a choice between two, [n × labels, 2]."""
    flat = probabilities.reshape(-1)
    return np.stack([1 - flat, flat], axis=1)


def _choices(targets: FloatArray) -> IntArray:
    return targets.reshape(-1).astype(np.int64)
