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

import torch

from core.jobs import FineTuneRequest, Json
from core.manifests import GateOutcome
from core.runs import REPORT, REPORT_HTML
from core.trunk import Trunk
from training import findings
from training.assessment import Assessment
from training.backbone_choice import BackboneChoice
from training.data import Dataset
from training.data_report import DataReport, RowSet
from training.fit import Fit, IntArray
from training.imbalance import IMBALANCED
from training.investigation import Investigation
from training.precision import Choice
from training.prospect import Prospect
from training.report import Decision, Lineage, Report
from training.report_html import render, thumbnails
from training.search_state import Step


@dataclass(frozen=True)
class Choices:
    """What a job decided where its request said `auto`; None where it did not."""

    backbone: BackboneChoice | None = None
    precision: Choice | None = None
    strategy: Prospect | None = None


@dataclass(frozen=True)
class Evidence:
    """What the stages of a job have found, for its report; `targets` are of the training rows."""

    train: Dataset
    train_rows: RowSet
    targets: IntArray
    held_out: Dataset | None
    held_out_rows: RowSet | None
    trunk: Trunk
    data: DataReport
    fitted: Fit
    steps: tuple[Step, ...]
    assessment: Assessment
    investigation: Investigation
    gate: GateOutcome | None
    production: str | None
    choices: Choices = Choices()
    parent: str | None = None

    @property
    def judged(self) -> RowSet:
        """The rows that the metrics are of."""
        return self.held_out_rows or self.train_rows


def write_report(
    job: str, model: str, request: FineTuneRequest, evidence: Evidence, seconds: Mapping[str, float]
) -> dict[str, bytes]:
    """Return the report as files of a version."""
    report = build_report(job, model, request, evidence, seconds)
    page = render(
        report,
        worst=thumbnails(evidence.judged, [error.row for error in report.worst_errors]),
        doubted=thumbnails(evidence.train_rows, [d.row for d in report.label_errors.examples]),
    )
    return {REPORT: report.model_dump_json(indent=1).encode(), REPORT_HTML: page}


def build_report(
    job: str, model: str, request: FineTuneRequest, evidence: Evidence, seconds: Mapping[str, float]
) -> Report:
    """Return everything that was found, in the report's schema."""
    fitted, assessment, investigated = evidence.fitted, evidence.assessment, evidence.investigation
    labels = evidence.train.manifest.classes
    doubts = findings.label_errors(assessment, evidence.train_rows, evidence.targets, labels)
    return Report(
        job=job,
        model=model,
        created_at=time.time(),
        request=request.model_dump(mode="json"),
        verdicts=findings.verdicts(
            assessment, evidence.data, investigated.transfer, investigated.curve, doubts,
            evidence.gate,
        ),
        evaluated_on=assessment.source,
        dataset=evidence.train.manifest,
        data=evidence.data,
        metrics=assessment.metrics,
        calibration=assessment.calibration,
        transfer=investigated.transfer,
        gate=evidence.gate,
        confusions=findings.confusions(assessment, labels),
        worst_errors=findings.worst_errors(assessment, evidence.judged, labels),
        label_errors=doubts,
        learning_curve=investigated.curve,
        strength=fitted.strength,
        folds=fitted.folds,
        candidates=fitted.candidates,
        steps=evidence.steps,
        remedy=fitted.remedy,
        remedies=fitted.remedies,
        decisions=_decisions(evidence),
        seconds=dict(seconds)
        | {f"report_{part}": value for part, value in investigated.seconds.items()},
        peak_memory_bytes=peak_memory_bytes(),
        seed=request.seed,
        environment=environment(),
        lineage=Lineage(
            backbone=request.model,
            trunk=evidence.trunk.manifest.digest,
            training_file=evidence.train.file,
            dataset=evidence.train.manifest.sha256,
            validation_file=evidence.held_out.file if evidence.held_out else None,
            validation_dataset=evidence.held_out.manifest.sha256 if evidence.held_out else None,
            parent=evidence.parent,
            production=evidence.production,
        ),
    )  # fmt: skip


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


def _decisions(evidence: Evidence) -> tuple[Decision, ...]:
    """Say what was chosen without being asked, and why."""
    fitted, assessment = evidence.fitted, evidence.assessment
    chosen = next(c for c in fitted.candidates if c.strength == fitted.strength)
    return (
        *_of_auto(evidence.choices),
        *_of_unfreezing(evidence.steps),
        Decision(
            what="L2 strength",
            chosen=f"{fitted.strength:.2g}",
            why=f"the strongest whose held-out loss ({chosen.nll:.4f}) is within one standard "
            f"error of the lowest of {len(fitted.candidates)}",
        ),
        Decision(
            what="Class imbalance",
            chosen=fitted.remedy.replace("_", " "),
            why="the best macro F1 on held-out rows by more than one standard error, or nothing"
            if fitted.remedies
            else f"no class has {IMBALANCED:g} times the rows of another",
        ),
        Decision(
            what="Temperature",
            chosen=f"{assessment.calibration.temperature:.3f}",
            why="the likeliest on held-out rows; it divides the weights and the bias of head.onnx",
        ),
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
            f"the best before; accuracy {step.accuracy:.3f}",
        )
