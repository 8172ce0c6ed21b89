"""How long each stage of a fine-tune job will take, and how much memory, before it has begun.

These are estimates from the size of the data and the costs below, measured on 2 shared cores with
two threads and a warm child (docs/decisions/0027). They leave out the wait for a worker, and that
features and results may be known from an earlier job. How far they are off on the machines at hand,
the queue learns (core.queue.protocol); what is left of a job and what waits, service.forecast makes
of them.

Not here: reading what an estimate is made of (core.appraisal).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.datasets import Modality
from core.outlook import Estimate

START_SECONDS = 0.15
"""Reading the data, opening a trunk that the child has loaded."""
FINISH_SECONDS = 0.2
"""Export, checks, publishing, and the service processes' word that they serve the model."""
EXPORT_SECONDS = 7.0
"""A trunk that the store does not have yet: 7.0 s for MiniLM, 4.5 s for EfficientNet-Lite0."""
TEXT_ROW_SECONDS = 1.5e-3
"""A short text through MiniLM, whose `row_cost` is 1: 1.5 ms were measured for 12 words."""
TOKEN_SECONDS = 0.1e-3
"""Each token of a longer one: 4.7 ms were measured for 50 words, 20 ms for 200."""
BYTES_PER_TOKEN = 5
MAX_TOKENS = 256
IMAGE_SECONDS = 7.5e-3
"""A 640×480 JPEG, decoded, resized and through EfficientNet-Lite0: 5 to 7.3 ms."""
PRECISION_COST = {"fp32": 1.0, "int8": 0.4, "auto": 1.4}
"""Features in int8 against fp32 (docs/performance.md); `auto` computes both."""
FIT_DIM_SECONDS = 0.25e-3
"""For each feature: 0.1 s were measured for 384 of them, 0.1 to 0.4 s for 1280."""
FIT_CELL_SECONDS = 5e-9
"""For each row × feature × class, in each fold, over all strengths."""
FOLDS, FOLDS_OF_MANY_ROWS, MANY_ROWS = 5, 3, 2000
"""As in training.fit."""
REPORT_SECONDS = {Modality.TEXT: 0.2, Modality.IMAGE: 0.9}
CURVE_SHARE = 0.9
"""The learning curve against the fit, fold by fold; beyond `MANY_ROWS` it takes one fold."""
TUNING_VISITS, LEAST_EPOCHS, MOST_EPOCHS = 5000, 3, 30
"""How often `gradual` comes by a row in a rung, all rows counted together (training.gradual)."""
VISIT_COST = {Modality.TEXT: 5.0, Modality.IMAGE: 1.1}
"""One such visit over all rungs, in runs of a row through the trunk: 38 s for 400 short texts."""
WHOLE_VISITS = {Modality.TEXT: 5000, Modality.IMAGE: 1300}
"""How often one training of `full` comes by a row (training.full)."""
WHOLE_COST = {Modality.TEXT: 7.0, Modality.IMAGE: 13.0}
"""One such visit, in runs of a row through the trunk."""
FEW_ROWS, FOLDS_OF_FEW_ROWS = 300, 3
"""As in training.judgement: so often `full` trains besides the last time; of more rows once."""
JUDGED_FITS = 4
"""Fits in which `gradual` judges its rungs."""
TUNED_SHARE = 0.8
"""Of `max_seconds`, after which `gradual` searches no more."""

CHILD_BYTES = 310_000_000
"""A child process that has imported torch."""
TRUNK_BYTES = {Modality.TEXT: 240_000_000, Modality.IMAGE: 180_000_000}
"""What a loaded trunk and its largest batches add."""
WHOLE_BYTES = {Modality.TEXT: 1_900_000_000, Modality.IMAGE: 800_000_000}
"""What `full` adds: the backbone's parameters many times, and what a batch leaves in its blocks."""
FEATURE_COPIES = 8
"""The features, scaled, and once more in the folds."""
ITEM_COPIES = 2
"""The rows as stored, and as read."""


@dataclass(frozen=True)
class Workload:
    """What a job has to do. `rows` are fitted; of `new_rows`, held-out ones included, features are
    computed, for the others are known; `stored_bytes` is of the uploads that hold the new ones.

    `trunks` have to be exported first. `model` is a backbone or `auto`, `row_cost` the backbone's
    (core.backbones); `is_rough` says that its costs are not known, or that the job decides by
    itself how much it does.
    """

    model: str
    modality: Modality
    dim: int
    rows: int
    new_rows: int
    classes: int
    stored_bytes: int
    row_cost: float = 1.0
    strategy: str = "feature_extraction"
    precision: str = "fp32"
    epochs: int | None = None
    max_seconds: float = 3600
    trunks: int = 0
    is_rough: bool = False


def estimate(work: Workload) -> Estimate:
    """Return the seconds of each stage, from the child's first to the published version."""
    row = _row_seconds(work)
    fit_once = FIT_CELL_SECONDS * work.rows * work.dim * work.classes
    fit = FIT_DIM_SECONDS * work.dim + fit_once * _folds(work.rows)
    curve_folds = 1 if work.rows > MANY_ROWS else FOLDS
    stages = {
        "data": START_SECONDS,
        "trunk": EXPORT_SECONDS * work.trunks,
        "features": work.new_rows * row * PRECISION_COST[work.precision],
        "fit": fit,
        "report": REPORT_SECONDS[work.modality] + CURVE_SHARE * curve_folds * fit_once,
        "publish": FINISH_SECONDS,
    }
    if work.strategy != "feature_extraction":
        tuning = _tuning_runs(work) * row + JUDGED_FITS * fit
        stages["unfreeze"] = min(tuning, TUNED_SHARE * work.max_seconds)
    pace = f"{work.model} {work.modality} {work.strategy} {work.precision}"
    rounded = {name: round(seconds, 3) for name, seconds in stages.items()}
    return Estimate(pace=pace, stages=rounded, is_rough=work.is_rough)


def memory_bytes(work: Workload) -> int:
    """Return the peak of the job's process; `gradual` keeps activations on the scratch disk."""
    floats = 4 * (work.rows + work.new_rows) // 2 * work.dim * FEATURE_COPIES
    whole = WHOLE_BYTES[work.modality] if work.strategy == "full" else 0
    usual = CHILD_BYTES + TRUNK_BYTES[work.modality]
    return usual + whole + floats + ITEM_COPIES * work.stored_bytes


def _row_seconds(work: Workload) -> float:
    if work.modality is Modality.IMAGE:
        return work.row_cost * IMAGE_SECONDS
    per_row = work.stored_bytes / work.new_rows
    tokens = min(MAX_TOKENS, math.ceil(per_row / BYTES_PER_TOKEN))
    return work.row_cost * max(TEXT_ROW_SECONDS, TOKEN_SECONDS * tokens)


def _folds(rows: int) -> int:
    return FOLDS_OF_MANY_ROWS if rows >= MANY_ROWS else FOLDS


def _tuning_runs(work: Workload) -> float:
    """Return what tuning takes, in runs of a row through the trunk."""
    if work.strategy != "full":
        return _visits(work, TUNING_VISITS) * VISIT_COST[work.modality]
    trainings = 1 + (FOLDS_OF_FEW_ROWS if work.rows < FEW_ROWS else 1)
    return _visits(work, WHOLE_VISITS[work.modality]) * trainings * WHOLE_COST[work.modality]


def _visits(work: Workload, usual: int) -> int:
    if work.epochs is not None:
        return work.epochs * work.rows
    return min(max(usual, LEAST_EPOCHS * work.rows), MOST_EPOCHS * work.rows)
