"""The tasks of a job: how each is fitted, judged, compared and reported. One table, one row each.

    task            fit                                judged by
    single_label    softmax regression                 accuracy, macro F1, calibration
    multi_label     a logistic regression each label   micro and macro F1, average precision
    ordinal         adjacent-category logits           also distance in ranks, weighted kappa
    regression      ridge                              absolute and squared error, R², coverage

What differs is here; the stages around it (training.pipeline), what heads give (core.tasks), and
their export (training.export) are the same for all. Not here: what differs when the backbone is
tuned (training.objectives).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

from core.datasets import Modality, Task
from core.preprocessing import FloatArray
from training import ridge
from training.assessment import Alternative, Assessment, Source, assess
from training.baselines import Transfer
from training.data import Targets, group
from training.data_report import RowSet
from training.decisions import Decision
from training.fit import Fit, Head, IntArray, fit, fit_labels, fit_ordered
from training.imbalance import Remedy
from training.investigation import (
    Comparison,
    Investigation,
    investigate,
    investigate_labels,
    investigate_values,
)
from training.multi_label import LabelAssessment, assess_labels
from training.objectives import (
    Classes,
    DoubleArray,
    Labels,
    Objective,
    Ranks,
    Values,
    class_likelihoods,
    label_likelihoods,
    value_likelihoods,
)
from training.regression import ValueAssessment, assess_values
from training.report import MultiLabelReport, RegressionReport, Report
from training.reporting import (
    Evidence,
    build_class_report,
    build_label_report,
    build_value_report,
)
from training.yardsticks import Standing

Validation = tuple[FloatArray, Targets]


class Judged(Protocol):
    """A head and how it did on rows that it was not fitted on; `rows` are their numbers, if some.

    `outputs` [n, width] are what it gave for `targets`.
    """

    @property
    def head(self) -> Head:
        """The head that is to be served."""

    @property
    def source(self) -> Source:
        """Which rows those are."""

    @property
    def outputs(self) -> FloatArray:
        """What the head gave for them."""

    @property
    def rows(self) -> IntArray | None:
        """Their numbers among the training rows; None for all of them, or for another file's."""

    def summary(self) -> dict[str, float]:
        """Return the figures of a manifest."""

    def decisions(self) -> tuple[Decision, ...]:
        """Return what was decided on the rows that judge."""

    def sentence(self) -> str:
        """Return one sentence for the job's history."""


class Investigated(Protocol):
    """What takes time to find out."""

    @property
    def yardstick(self) -> Transfer | Standing:
        """The comparison with models that know nothing beforehand."""

    @property
    def seconds(self) -> dict[str, float]:
        """How long each part took."""

    def advised(self, advice: str | None) -> Self:
        """Return the same with what to do about a backbone that does not help."""


A = TypeVar("A", bound=Judged)
F = TypeVar("F", bound=Investigated)


@dataclass(frozen=True)
class TaskRow(Generic[A, F]):
    """One task.

    `fit(features, targets, width, seed, twins)`; `objective(targets, width, remedy)` is what tuning
    strives for; `likelihoods(outputs, targets)` are by row, in nats, of held-out rows;
    `assess(fit, targets, labels, validation, alternative)`;
    `investigate(modality, training rows, targets, validation rows, fit, assessment, seed)`, which
    gives `findings`;
    `report(evidence, common fields)`.
    """

    fit: Callable[[FloatArray, Targets, int, int, IntArray], Fit]
    objective: Callable[[Targets, int, Remedy], Objective]
    likelihoods: Callable[[FloatArray, Targets], DoubleArray]
    assess: Callable[[Fit, Targets, Sequence[str], Validation | None, Alternative | None], A]
    investigate: Callable[[Modality, RowSet, Targets, RowSet | None, Fit, A, int], F]
    findings: type[F]
    report: Callable[[Evidence, dict[str, Any]], Report | MultiLabelReport | RegressionReport]


def _fit_classes(
    features: FloatArray, targets: Targets, width: int, seed: int, twins: IntArray
) -> Fit:
    return fit(features, targets, width, seed=seed, twins=twins)


def _fit_ordered(
    features: FloatArray, targets: Targets, width: int, seed: int, twins: IntArray
) -> Fit:
    return fit_ordered(features, targets, width, seed=seed, twins=twins)


def _fit_labels(features: FloatArray, targets: Targets, _: int, seed: int, twins: IntArray) -> Fit:
    groups = group(Task.MULTI_LABEL, targets)
    return fit_labels(features, targets, groups, seed=seed, twins=twins)


def _fit_values(features: FloatArray, targets: Targets, _: int, seed: int, twins: IntArray) -> Fit:
    groups = group(Task.REGRESSION, targets)
    return ridge.fit_values(features, targets, groups, seed=seed, twins=twins)


def _investigate_classes(
    modality: Modality, train: RowSet, targets: Targets, validation: RowSet | None, fitted: Fit,
    assessment: Assessment, seed: int,
) -> Investigation:  # fmt: skip
    return investigate(
        modality, train, targets, validation, fitted, assessment,
        classes=assessment.probabilities.shape[1], seed=seed,
    )  # fmt: skip


def _investigate_labels(
    modality: Modality, train: RowSet, targets: Targets, validation: RowSet | None, fitted: Fit,
    assessment: LabelAssessment, seed: int,
) -> Comparison:  # fmt: skip
    return investigate_labels(modality, train, targets, validation, fitted, assessment, seed)


def _investigate_values(
    modality: Modality, train: RowSet, targets: Targets, validation: RowSet | None, fitted: Fit,
    assessment: ValueAssessment, seed: int,
) -> Comparison:  # fmt: skip
    return investigate_values(modality, train, targets, validation, fitted, assessment, seed)


_CLASSES: TaskRow[Assessment, Investigation] = TaskRow(
    fit=_fit_classes,
    objective=Classes,
    likelihoods=class_likelihoods,
    assess=assess,
    investigate=_investigate_classes,
    findings=Investigation,
    report=build_class_report,
)
_ORDERED = replace(_CLASSES, fit=_fit_ordered, objective=Ranks)
_LABELS: TaskRow[LabelAssessment, Comparison] = TaskRow(
    fit=_fit_labels,
    objective=Labels,
    likelihoods=label_likelihoods,
    assess=assess_labels,
    investigate=_investigate_labels,
    findings=Comparison,
    report=build_label_report,
)
_VALUES: TaskRow[ValueAssessment, Comparison] = TaskRow(
    fit=_fit_values,
    objective=Values,
    likelihoods=value_likelihoods,
    assess=lambda fitted, targets, _, validation, alternative: assess_values(
        fitted, targets, validation, alternative
    ),
    investigate=_investigate_values,
    findings=Comparison,
    report=build_value_report,
)
TASKS: dict[Task, TaskRow[Any, Any]] = {
    Task.SINGLE_LABEL: _CLASSES,
    Task.MULTI_LABEL: _LABELS,
    Task.ORDINAL: _ORDERED,
    Task.REGRESSION: _VALUES,
}
