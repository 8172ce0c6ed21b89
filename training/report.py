"""The evaluation report's schema: all that a job found out about its data and its model.

`report.json` is a `Report` and nothing else; `report.html` (training.report_html) is made of the
same object, so neither says more than the other, pictures of wrongly answered images apart. A field
may be added to the format at any time; one that changes its meaning makes it `graft-report-2`.

Not here: the findings themselves; each has its module, and training.findings puts them in words.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from core.datasets import DatasetManifest, Task
from core.jobs import Json
from core.manifests import GateOutcome, Interval
from training.assessment import Source
from training.baselines import Transfer
from training.calibration import Calibration
from training.data_report import DataReport
from training.decisions import Decision
from training.evaluation import Metrics
from training.imbalance import Remedy, RemedyCandidate
from training.learning_curve import LearningCurve
from training.multi_label import MultiLabelMetrics
from training.ordinal import OrdinalMetrics
from training.regression import RegressionMetrics
from training.search_state import Step
from training.strength import Candidate
from training.yardsticks import Standing


class LabelError(BaseModel, frozen=True):
    """A training row (from 1) whose label is in doubt, and the label that is likelier."""

    row: int
    label: str
    suggested: str
    margin: float
    text: str | None = None


class LabelErrors(BaseModel, frozen=True):
    """How many labels are in doubt; `row_numbers` has all of them, `examples` the worst."""

    rows: int
    row_numbers: tuple[int, ...]
    examples: tuple[LabelError, ...]


class Confusion(BaseModel, frozen=True):
    """How many rows of `label` were said to be `predicted`."""

    label: str
    predicted: str
    rows: int


class WorstError(BaseModel, frozen=True):
    """A held-out row (from 1) that was answered wrongly, and how surely."""

    row: int
    label: str
    predicted: str
    confidence: float
    label_probability: float
    text: str | None = None


class Verdict(BaseModel, frozen=True):
    """A sentence for the top of the page; `warn` wants to be looked at."""

    level: Literal["good", "note", "warn"]
    text: str


class Lineage(BaseModel, frozen=True):
    """What the model is made of. `parent` is the model it continues from, if any."""

    backbone: str
    trunk: str
    training_file: str
    dataset: str
    validation_file: str | None
    validation_dataset: str | None
    parent: str | None
    production: str | None


class WorstAnswer(BaseModel, frozen=True):
    """A held-out row (from 1) whose answer was furthest off, by its share of the `loss`."""

    row: int
    truth: str
    answer: str
    loss: float
    text: str | None = None


class AnyReport(BaseModel, frozen=True):
    """What reports of all tasks have. Rows are numbered from 1; probabilities are calibrated.

    `seconds` is by stage, and within the report by part; parts run side by side. `of_frozen_head`
    names the fields that tell of the head on frozen features, although a tuned model ships, of
    which all others tell; it is empty if that head ships.
    """

    format: Literal["graft-report-1"] = "graft-report-1"
    job: str
    model: str
    created_at: float
    request: Json
    task: Task = Task.SINGLE_LABEL
    verdicts: tuple[Verdict, ...]
    evaluated_on: Source
    of_frozen_head: tuple[str, ...] = ()
    dataset: DatasetManifest
    data: DataReport
    gate: GateOutcome | None
    strength: float
    folds: int
    candidates: tuple[Candidate, ...]
    decisions: tuple[Decision, ...]
    steps: tuple[Step, ...]
    seconds: dict[str, float]
    peak_memory_bytes: int
    seed: int
    environment: Json
    lineage: Lineage


class Report(AnyReport, frozen=True):
    """One class a row. `confusions` has what was answered wrongly, most frequent first.

    `ordinal` is of classes in order.
    """

    metrics: Metrics
    ordinal: OrdinalMetrics | None = None
    calibration: Calibration
    transfer: Transfer
    confusions: tuple[Confusion, ...]
    worst_errors: tuple[WorstError, ...]
    label_errors: LabelErrors
    learning_curve: LearningCurve
    remedy: Remedy
    remedies: tuple[RemedyCandidate, ...]


class MultiLabelReport(AnyReport, frozen=True):
    """Several labels a row; a row's `loss` is in nats. Labels in doubt are not looked for."""

    metrics: MultiLabelMetrics
    calibration: Calibration
    standing: Standing
    worst_errors: tuple[WorstAnswer, ...]


class RegressionReport(AnyReport, frozen=True):
    """Values; a row's `loss` is the absolute error. Values in doubt are not looked for."""

    metrics: RegressionMetrics
    interval: Interval
    standing: Standing
    worst_errors: tuple[WorstAnswer, ...]
