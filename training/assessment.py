"""A fit judged on rows it was not fitted on, and made to say how sure it is.

On the validation file if there is one, or else out of fold on the training rows; the temperature
comes from the same rows, since what a person holds out is what they expect to be served (of a file
with fewer than `MIN_CALIBRATION_ROWS`, from the out-of-fold rows). The probabilities that are
judged are calibrated ones, each row's with the temperature of folds that it is not in. Not here:
the metrics (training.evaluation), the temperature (training.calibration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from core.preprocessing import FloatArray
from training import decisions
from training.calibration import (
    Calibration,
    calibration,
    cross_rescale,
    fold_into,
    rescale,
)
from training.decisions import Decision
from training.evaluation import Metrics, evaluate
from training.fit import Fit, Head, IntArray, deal, fold_count
from training.ordinal import OrdinalMetrics, evaluate_order

MIN_CALIBRATION_ROWS = 100
Source = Literal["cross_validation", "held_out_rows", "validation_file"]
SOURCES: dict[Source, str] = {
    "cross_validation": "cross-validated",
    "held_out_rows": "on held-out rows",
    "validation_file": "on the validation file",
}


@dataclass(frozen=True)
class Alternative:
    """A head that was preferred to the fit's own, and how it did when fitted without some rows.

    `outputs` [n, width] are of the training rows whose numbers, rising, are `rows` [n].
    """

    head: Head
    rows: IntArray
    outputs: FloatArray


@dataclass(frozen=True)
class Assessment:
    """The calibrated head, and how it did: `probabilities` [n, classes] for `targets` [n].

    `out_of_fold` are the training rows' calibrated probabilities by heads that had not seen them:
    of what ships, if every row was held out in turn, or else (`is_frozen`) on frozen features;
    `rows` are the numbers of those that were held out, None if all were or a validation file was.
    `cross_validated_accuracy` is that of training rows that were held out from what ships.
    `ordinal` is of classes in order.
    """

    head: Head
    source: Source
    cross_validated_accuracy: float
    metrics: Metrics
    calibration: Calibration
    probabilities: FloatArray
    targets: IntArray
    out_of_fold: FloatArray
    rows: IntArray | None
    is_frozen: bool = False
    ordinal: OrdinalMetrics | None = None

    def summary(self) -> dict[str, float]:
        """Return the figures of a manifest and of the `metrics` event."""
        ordinal = {} if self.ordinal is None else self.ordinal.summary()
        return self.metrics.summary() | self.calibration.summary() | ordinal

    def decisions(self) -> tuple[Decision, ...]:
        """Return what was decided on the rows that judge."""
        return (decisions.temperature(self.calibration),)

    def sentence(self) -> str:
        """Return one sentence for the job's history."""
        found = self.metrics
        ordinal = f"{self.ordinal.sentence()} " if self.ordinal else ""
        return (
            f"{ordinal}Accuracy {found.accuracy:.3f} ± {found.accuracy_error:.3f} "
            f"{SOURCES[self.source]}; the most frequent class alone gives "
            f"{found.majority_accuracy:.3f}."
        )

    @property
    def outputs(self) -> FloatArray:
        """What the head gave for the judged rows, as of every task."""
        return self.probabilities

    @property
    def accuracy(self) -> float:
        """What a quality gate judges."""
        return self.metrics.accuracy


def assess(
    fitted: Fit,
    targets: IntArray,
    labels: Sequence[str],
    validation: tuple[FloatArray, IntArray] | None,
    alternative: Alternative | None = None,
) -> Assessment:
    """Calibrate and judge a fit on rows of `targets`, or what was preferred to it.

    `validation` is the features, as the judged head takes them, and targets of other rows.
    """
    out_of_fold, temperature = cross_rescale(fitted.out_of_fold, targets, fitted.fold_of)
    head, rows = fitted.head, None
    source: Source = "cross_validation"
    before, after, truth = fitted.out_of_fold, out_of_fold, targets
    is_frozen = False
    if alternative is not None:
        head, before = alternative.head, alternative.outputs
        if len(alternative.rows) < len(targets):
            rows, source = alternative.rows, "held_out_rows"
        truth = targets[alternative.rows]
        after, temperature = _cross_calibrate(before, truth)
        if rows is None:
            out_of_fold = after
        is_frozen = rows is not None
    cross_validated_accuracy = float((after.argmax(axis=1) == truth).mean())
    if validation is not None:
        features, truth = validation
        source, rows, before = "validation_file", None, head.predict(features)
        if len(truth) >= MIN_CALIBRATION_ROWS:
            after, temperature = _cross_calibrate(before, truth)
        else:
            after = rescale(before, temperature)
    return Assessment(
        head=fold_into(head, temperature),
        source=source,
        cross_validated_accuracy=cross_validated_accuracy,
        metrics=evaluate(after, truth, labels),
        calibration=calibration(temperature, before, after, truth),
        probabilities=after,
        targets=truth,
        out_of_fold=out_of_fold,
        rows=rows,
        is_frozen=is_frozen,
        ordinal=evaluate_order(after, truth) if fitted.is_ordered else None,
    )


def _cross_calibrate(probabilities: FloatArray, truth: IntArray) -> tuple[FloatArray, float]:
    return cross_rescale(probabilities, truth, deal(truth, fold_count(len(truth)), seed=0))


def deal_rows(rows: int) -> IntArray:
    """Return folds, [rows], for rows that no fit has dealt to any."""
    return deal(np.zeros(rows, np.int64), fold_count(rows), seed=0)
