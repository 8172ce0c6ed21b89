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
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from core.datasets import Task
from core.jobs import FineTuneRequest, Json
from core.manifests import GateOutcome
from core.runs import REPORT, REPORT_HTML
from core.tasks import decide
from core.trunk import Trunk
from training import findings
from training.data import Dataset, Targets
from training.data_report import DataReport, RowSet
from training.decisions import Decision
from training.fit import Fit
from training.report import Lineage, MultiLabelReport, RegressionReport, Report
from training.report_html import render, thumbnails
from training.search_state import Step
from training.strength import label_losses


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
    decisions: tuple[Decision, ...]
    parent: str | None
    served_by: str
    is_tuned: bool

    @property
    def judged(self) -> RowSet:
        """The rows that the metrics are of."""
        return self.held_out_rows or self.train_rows


def write_report(
    report: Report | MultiLabelReport | RegressionReport, evidence: Evidence
) -> dict[str, bytes]:
    """Return a report as files of a version."""
    doubted = report.label_errors.examples if isinstance(report, Report) else ()
    data = report.data
    leaks = data.leaks.examples if data.leaks else ()
    pairs = (data.duplicates.examples, data.near_duplicates.examples)
    page = render(
        report,
        worst=thumbnails(evidence.judged, [error.row for error in report.worst_errors]),
        known=thumbnails(
            evidence.train_rows,
            [doubt.row for doubt in doubted],
            [outlier.row for outlier in data.outliers.examples],
            *([number for pair in found for number in (pair.row, pair.other)] for found in pairs),
            [leak.other for leak in leaks],
        ),
        other=thumbnails(evidence.judged, [leak.row for leak in leaks]),
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
            evidence.gate, is_tuned=evidence.is_tuned,
        ),
        "of_frozen_head": _of_frozen_head(
            evidence, "learning_curve", *(["label_errors"] if assessment.is_frozen else []),
            "remedy", "remedies",
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
        "of_frozen_head": _of_frozen_head(evidence),
        "dataset": evidence.train.manifest,
        "data": evidence.data,
        "gate": evidence.gate,
        "decisions": evidence.decisions,
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


def _of_frozen_head(evidence: Evidence, *more: str) -> tuple[str, ...]:
    return ("strength", "folds", "candidates", *more) if evidence.is_tuned else ()


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
