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

from core.preprocessing import FloatArray
from training.calibration import (
    Calibration,
    calibration,
    cross_rescale,
    fold_into,
    rescale,
)
from training.evaluation import Metrics, evaluate
from training.fit import FOLDS, Fit, Head, IntArray, deal

MIN_CALIBRATION_ROWS = 100
Source = Literal["cross_validation", "validation_file"]


@dataclass(frozen=True)
class Assessment:
    """The calibrated head, and how it did: `probabilities` [n, classes] for `targets` [n].

    `out_of_fold` are the training rows' calibrated probabilities; without a validation file they
    are the `probabilities`. `cross_validated_accuracy` is of the training rows either way.
    """

    head: Head
    source: Source
    cross_validated_accuracy: float
    metrics: Metrics
    calibration: Calibration
    probabilities: FloatArray
    targets: IntArray
    out_of_fold: FloatArray

    def summary(self) -> dict[str, float]:
        """Return the figures of a manifest and of the `metrics` event."""
        calibrated = self.calibration
        return self.metrics.summary() | {
            "ece": calibrated.after.ece,
            "ece_before": calibrated.before.ece,
            "nll_before": calibrated.before.nll,
            "temperature": calibrated.temperature,
        }


def assess(
    fitted: Fit,
    targets: IntArray,
    labels: Sequence[str],
    validation: tuple[FloatArray, IntArray] | None,
) -> Assessment:
    """Calibrate and judge a fit on rows of `targets`; `validation` is features and targets."""
    out_of_fold, temperature = cross_rescale(fitted.out_of_fold, targets, fitted.fold_of)
    if validation is None:
        source: Source = "cross_validation"
        before, after, truth = fitted.out_of_fold, out_of_fold, targets
    else:
        source = "validation_file"
        features, truth = validation
        before = fitted.head.predict(features)
        if len(truth) >= MIN_CALIBRATION_ROWS:
            after, temperature = cross_rescale(before, truth, deal(truth, FOLDS, seed=0))
        else:
            after = rescale(before, temperature)
    return Assessment(
        head=fold_into(fitted.head, temperature),
        source=source,
        cross_validated_accuracy=float((out_of_fold.argmax(axis=1) == targets).mean()),
        metrics=evaluate(after, truth, labels),
        calibration=calibration(temperature, before, after, truth),
        probabilities=after,
        targets=truth,
        out_of_fold=out_of_fold,
    )
