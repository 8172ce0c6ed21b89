"""Makes a job's report: asks each module for its findings, and writes `report.json` and `.html`.

Reads like the list of contents of a report. Not here: its schema (training.report), the page
(training.report_html), and when in a job it is made (training.pipeline).
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from core.datasets import Task
from core.jobs import FineTuneRequest, Json
from core.manifests import GateOutcome
from core.runs import REPORT, REPORT_HTML
from core.tasks import decide
from core.trunk import Trunk
from training import findings
from training.calibration import Calibration
from training.data import Dataset, Targets
from training.data_report import DataReport, RowSet
from training.fit import Fit
from training.imbalance import IMBALANCED
from training.precision import Choice
from training.prospect import Prospect
from training.report import Decision, Lineage, MultiLabelReport, RegressionReport, Report
from training.report_html import render, thumbnails
from training.search_state import Step
from training.strength import label_losses

if TYPE_CHECKING:
    from training.backbone_choice import BackboneChoice


@dataclass(frozen=True)
class Choices:
    """What a job decided where its request said `auto`; None where it did not."""

    backbone: BackboneChoice | None = None
    precision: Choice | None = None
    strategy: Prospect | None = None


@dataclass(frozen=True)
class Evidence:
    """What the stages of a job have found, for its report; `targets` are of the training rows.

    `assessment` and `investigation` are those of the task (training.tasks), `labels` in the order
    of the head's outputs, and `served_by` the digest of the trunk that ships.
    """

    task: Task
    labels: list[str]
    train: Dataset
    train_rows: RowSet
    targets: Targets
    held_out: Dataset | None
    held_out_rows: RowSet | None
    trunk: Trunk
    data: DataReport
    fitted: Fit
    steps: tuple[Step, ...]
    assessment: Any
    investigation: Any
    gate: GateOutcome | None
    production: str | None
    choices: Choices
    parent: str | None
    served_by: str

    @property
    def judged(self) -> RowSet:
        """The rows that the metrics are of."""
        return self.held_out_rows or self.train_rows


def write_report(
    report: Report | MultiLabelReport | RegressionReport, evidence: Evidence
) -> dict[str, bytes]:
    """Return a report as files of a version."""
    doubted = report.label_errors.examples if isinstance(report, Report) else ()
    page = render(
        report,
        worst=thumbnails(evidence.judged, [error.row for error in report.worst_errors]),
        doubted=thumbnails(evidence.train_rows, [doubt.row for doubt in doubted]),
    )
    return {REPORT: report.model_dump_json(indent=1).encode(), REPORT_HTML: page}


def build_class_report(evidence: Evidence, common: dict[str, Any]) -> Report:
    """Return everything that was found of one class a row, in order or not."""
    fitted, assessment, investigated = evidence.fitted, evidence.assessment, evidence.investigation
    labels = evidence.labels
    doubts = findings.label_errors(assessment, evidence.train_rows, evidence.targets, labels)
    fields: dict[str, Any] = common | {
        "verdicts": findings.verdicts(
            assessment, evidence.data, investigated.transfer, investigated.curve, doubts,
            evidence.gate,
        ),
        "decisions": (
            *_of_auto(evidence.choices), *_of_unfreezing(evidence.steps), _of_strength(fitted),
            _of_imbalance(fitted), _of_calibration(assessment.calibration),
        ),
    }  # fmt: skip
    return Report(
        **fields,
        metrics=assessment.metrics,
        ordinal=assessment.ordinal,
        calibration=assessment.calibration,
        transfer=investigated.transfer,
        confusions=findings.confusions(assessment, labels),
        worst_errors=findings.worst_errors(assessment, evidence.judged, labels),
        label_errors=doubts,
        learning_curve=investigated.curve,
        remedy=fitted.remedy,
        remedies=fitted.remedies,
    )


def build_label_report(evidence: Evidence, common: dict[str, Any]) -> MultiLabelReport:
    """Return everything that was found of several labels a row."""
    assessment, standing = evidence.assessment, evidence.investigation.standing
    error = assessment.calibration.after.ece
    warnings = (
        [f"Probabilities are off by {100 * error:.0f} points on average."]
        if error > findings.LARGE_CALIBRATION_ERROR
        else []
    )
    truth = decide(Task.MULTI_LABEL, assessment.targets, evidence.labels)
    answers = decide(Task.MULTI_LABEL, assessment.outputs, evidence.labels)
    losses = label_losses(assessment.outputs, assessment.targets)
    fields: dict[str, Any] = common | {
        "verdicts": findings.other_verdicts(standing, evidence.data, evidence.gate, warnings),
        "decisions": (
            *_of_auto(evidence.choices), *_of_unfreezing(evidence.steps),
            _of_strength(evidence.fitted),
            _of_calibration(assessment.calibration),
            Decision(
                what="Threshold", chosen=f"{assessment.metrics.threshold:g}",
                why="of calibrated probabilities: a label is given where it is likelier than not",
            ),
        ),
    }  # fmt: skip
    return MultiLabelReport(
        **fields,
        metrics=assessment.metrics,
        calibration=assessment.calibration,
        standing=standing,
        worst_errors=findings.worst_answers(
            losses, truth, answers, evidence.judged, assessment.rows
        ),
    )


def build_value_report(evidence: Evidence, common: dict[str, Any]) -> RegressionReport:
    """Return everything that was found of values."""
    assessment, standing = evidence.assessment, evidence.investigation.standing
    metrics = assessment.metrics
    low, high = metrics.covered_interval
    warnings = []
    if not low <= metrics.coverage <= high:
        warnings.append(
            f"The interval holds {100 * metrics.covered:.0f} % of the held-out values, not "
            f"{100 * metrics.coverage:.0f} %."
        )
    truth = decide(Task.REGRESSION, assessment.targets[:, None], [])
    answers = decide(Task.REGRESSION, assessment.outputs, [])
    losses = np.abs(assessment.outputs[:, 0] - assessment.targets)
    fields: dict[str, Any] = common | {
        "verdicts": findings.other_verdicts(standing, evidence.data, evidence.gate, warnings),
        "decisions": (
            *_of_auto(evidence.choices), *_of_unfreezing(evidence.steps),
            _of_strength(evidence.fitted),
            Decision(
                what="Interval", chosen=f"± {assessment.interval.half_width:.4g}",
                why=f"the error that {100 * assessment.interval.coverage:.0f} % of held-out rows "
                "do not exceed (conformal prediction)",
            ),
        ),
    }  # fmt: skip
    return RegressionReport(
        **fields,
        metrics=metrics,
        interval=assessment.interval,
        standing=standing,
        worst_errors=findings.worst_answers(
            losses, truth, answers, evidence.judged, assessment.rows
        ),
    )


def common_fields(
    job: str, model: str, request: FineTuneRequest, evidence: Evidence, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return the fields that reports of all tasks have, but for what is put in words."""
    fitted = evidence.fitted
    return {
        "job": job,
        "model": model,
        "created_at": time.time(),
        "request": request.model_dump(mode="json"),
        "task": evidence.task,
        "evaluated_on": evidence.assessment.source,
        "dataset": evidence.train.manifest,
        "data": evidence.data,
        "gate": evidence.gate,
        "strength": fitted.strength,
        "folds": fitted.folds,
        "candidates": fitted.candidates,
        "steps": evidence.steps,
        "seconds": dict(seconds)
        | {f"report_{part}": value for part, value in evidence.investigation.seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "seed": request.seed,
        "environment": environment(),
        "lineage": Lineage(
            backbone=request.model,
            trunk=evidence.served_by,
            training_file=evidence.train.file,
            dataset=evidence.train.manifest.sha256,
            validation_file=evidence.held_out.file if evidence.held_out else None,
            validation_dataset=evidence.held_out.manifest.sha256 if evidence.held_out else None,
            parent=evidence.parent,
            production=evidence.production,
        ),
    }


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> Json:
    """Return what the numbers were made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _of_strength(fitted: Fit) -> Decision:
    chosen = next(c for c in fitted.candidates if c.strength == fitted.strength)
    return Decision(
        what="L2 strength",
        chosen=f"{fitted.strength:.2g}",
        why=f"the strongest whose held-out loss ({chosen.nll:.4f}) is within one standard "
        f"error of the lowest of {len(fitted.candidates)}",
    )


def _of_imbalance(fitted: Fit) -> Decision:
    if fitted.is_ordered:
        why = "remedies are for classes without an order"
    elif fitted.remedies:
        why = "the best macro F1 on held-out rows by more than one standard error, or nothing"
    else:
        why = f"no class has {IMBALANCED:g} times the rows of another"
    return Decision(what="Class imbalance", chosen=fitted.remedy.replace("_", " "), why=why)


def _of_calibration(calibration: Calibration) -> Decision:
    return Decision(
        what="Temperature",
        chosen=f"{calibration.temperature:.3f}",
        why="the likeliest on held-out rows; it divides the weights and the bias of head.onnx",
    )


def _of_auto(choices: Choices) -> Iterator[Decision]:
    if choices.backbone is not None:
        tried = ", ".join(
            f"{each.model} {each.accuracy:.3f}"
            for each in choices.backbone.candidates
            if each.accuracy is not None
        )
        why = f"{choices.backbone.reason}; cross-validated accuracy: {tried}"
        yield Decision(what="Backbone", chosen=choices.backbone.model, why=why)
    if choices.precision is not None:
        yield Decision(
            what="Precision", chosen=choices.precision.precision, why=choices.precision.reason
        )
    if choices.strategy is not None:
        yield Decision(
            what="Strategy", chosen=choices.strategy.strategy, why=choices.strategy.reason
        )


def _of_unfreezing(steps: tuple[Step, ...]) -> Iterator[Decision]:
    for step in steps[1:]:
        yield Decision(
            what=step.name,
            chosen="kept" if step.kept else "not kept",
            why=f"log-likelihood {step.gain:+.4f} ± {step.gain_error:.4f} a held-out row against "
            f"the best before; {step.score}",
        )
