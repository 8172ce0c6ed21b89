"""Values: how far answers are from them, and how wide an interval has to be.

Rows are judged as those of classes are (training.assessment): on the validation file, or out of
fold. The interval comes from the same rows, and what it is said to cover is of rows whose own error
had no part in it. Figures have intervals of 95 %, by the bootstrap (Efron 1979). Not here: the fit
and the quantile (training.ridge).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.manifests import Interval
from core.preprocessing import FloatArray
from training import decisions, evaluation
from training.assessment import SOURCES, Alternative, Source, deal_rows
from training.decisions import Decision
from training.evaluation import RESAMPLES, wilson
from training.fit import Fit, Head, IntArray
from training.ridge import conformal

FEWEST_ERRORS = 20
"""Of a validation file with fewer rows, no interval can be told."""

DoubleArray = npt.NDArray[np.float64]


class RegressionMetrics(BaseModel, frozen=True):
    """Of `rows` answers: mean absolute and root mean squared error, and explained variance.

    `baseline_mae` and `baseline_rmse` are of always answering the training rows' mean. `mean_error`
    is the answer minus the value. Of the rows, `covered` are within `half_width` of the answer,
    where `coverage` is meant to be; `deviation` is of the values.
    """

    rows: int
    mae: float
    mae_interval: evaluation.Interval
    rmse: float
    rmse_interval: evaluation.Interval
    r2: float
    r2_interval: evaluation.Interval
    mean_error: float
    baseline_mae: float
    baseline_rmse: float
    half_width: float
    coverage: float
    covered: float
    covered_interval: evaluation.Interval
    deviation: float

    def summary(self) -> dict[str, float]:
        """Return the numbers of a manifest."""
        names = (
            "mae", "rmse", "r2", "mean_error", "baseline_mae", "baseline_rmse", "half_width",
            "coverage", "covered",
        )  # fmt: skip
        return {name: float(getattr(self, name)) for name in names} | {"rows": float(self.rows)}


@dataclass(frozen=True)
class ValueAssessment:
    """The head, and how it did: `outputs` [n, 1] for `targets` [n]."""

    head: Head
    source: Source
    metrics: RegressionMetrics
    interval: Interval
    outputs: FloatArray
    targets: DoubleArray
    rows: IntArray | None = None

    def summary(self) -> dict[str, float]:
        """Return the figures of a manifest and of the `metrics` event."""
        return self.metrics.summary()

    def decisions(self) -> tuple[Decision, ...]:
        """Return what was decided on the rows that judge."""
        return (decisions.interval(self.interval),)

    def sentence(self) -> str:
        """Return one sentence for the job's history."""
        found = self.metrics
        return (
            f"Mean absolute error {found.mae:.4g} {SOURCES[self.source]}, R² {found.r2:.3f}; "
            f"the mean alone gives {found.baseline_mae:.4g}. "
            f"{100 * found.coverage:.0f} % are within {found.half_width:.4g}."
        )


def assess_values(
    fitted: Fit, targets: DoubleArray, validation: tuple[FloatArray, DoubleArray] | None,
    alternative: Alternative | None = None,
) -> ValueAssessment:  # fmt: skip
    """Judge a fit on rows of values `targets` [n], or what was preferred to it, or on other rows.

    See `training.assessment.assess`.
    """
    head, rows = fitted.head, None
    outputs, truth, fold_of = fitted.out_of_fold, targets, fitted.fold_of
    source: Source = "cross_validation"
    if alternative is not None:
        head, outputs = alternative.head, alternative.outputs
        truth, fold_of = targets[alternative.rows], deal_rows(len(alternative.rows))
        if len(alternative.rows) < len(targets):
            rows, source = alternative.rows, "held_out_rows"
    interval = conformal(outputs[:, 0] - truth)
    if validation is not None:
        features, truth = validation
        source, rows, outputs = "validation_file", None, head.predict(features)
        fold_of = deal_rows(len(truth))
        if len(truth) >= FEWEST_ERRORS:
            interval = conformal(outputs[:, 0] - truth)
    mean = float(targets.mean())
    return ValueAssessment(
        head=head,
        source=source,
        metrics=evaluate_values(outputs[:, 0].astype(np.float64), truth, mean, interval, fold_of),
        interval=interval,
        outputs=outputs,
        targets=truth,
        rows=rows,
    )


def evaluate_values(
    answers: DoubleArray, values: DoubleArray, mean: float, interval: Interval, fold_of: IntArray
) -> RegressionMetrics:
    """Score `answers` [n] against `values` [n]; `mean` is what always answering it stands for."""
    errors, baseline = answers - values, mean - values
    held = _covered(errors, interval, fold_of)
    variances = np.square(values - values.mean())
    mae_interval, rmse_interval, r2_interval = _bootstrap(
        len(errors),
        (
            lambda draw: float(np.abs(errors[draw]).mean()),
            lambda draw: float(np.sqrt(np.square(errors[draw]).mean())),
            lambda draw: _r2(errors[draw], values[draw]),
        ),
    )
    return RegressionMetrics(
        rows=len(errors),
        mae=float(np.abs(errors).mean()),
        mae_interval=mae_interval,
        rmse=float(np.sqrt(np.square(errors).mean())),
        rmse_interval=rmse_interval,
        r2=_r2(errors, values),
        r2_interval=r2_interval,
        mean_error=float(errors.mean()),
        baseline_mae=float(np.abs(baseline).mean()),
        baseline_rmse=float(np.sqrt(np.square(baseline).mean())),
        half_width=interval.half_width,
        coverage=interval.coverage,
        covered=float(held.mean()),
        covered_interval=wilson(int(held.sum()), len(held)),
        deviation=float(np.sqrt(variances.mean())),
    )


def _covered(errors: DoubleArray, interval: Interval, fold_of: IntArray) -> npt.NDArray[np.bool_]:
    """Tell of each row whether the interval holds that the other folds' errors give."""
    held = np.abs(errors) <= interval.half_width
    if len(errors) < FEWEST_ERRORS:
        return held
    for fold in np.unique(fold_of):
        mine = fold_of == fold
        others = conformal(errors[~mine], interval.coverage)
        held[mine] = np.abs(errors[mine]) <= others.half_width
    return held


def _r2(errors: DoubleArray, values: DoubleArray) -> float:
    """Return the share of the variance that is explained; 0 where there is none to explain."""
    total = float(np.square(values - values.mean()).sum())
    return 1 - float(np.square(errors).sum()) / total if total > 0 else 0.0


def _bootstrap(
    rows: int, scores: Sequence[Callable[[IntArray], float]]
) -> list[evaluation.Interval]:
    numbers = np.random.default_rng(0)
    draws = [numbers.integers(0, rows, rows) for _ in range(RESAMPLES)]
    found = []
    for score in scores:
        low, high = np.quantile([score(draw) for draw in draws], (0.025, 0.975))
        found.append((float(low), float(high)))
    return found
