"""Which backbone a job starts from, when its request leaves that open (`model: "auto"`).

    each allowed backbone of the modality ─▶ features of a sample ─▶ head ─▶ out-of-fold likelihood

The candidates are cross-validated with the head and the folds that the job itself would use
(classes in order as if they had none), on at most `SAMPLE_ROWS` rows. The first of those within one
standard error of the best is taken: their order, the quickest first, is the table's and not a
clock's, so that a job that is run again decides the same. What is computed here the feature cache
keeps.

Not here: the backbones and their order (core.backbones), their precision (training.precision).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.errors import DataError
from core.preprocessing import FloatArray
from training.data import Dataset
from training.duplicates import twins
from training.judgement import compare
from training.precision import sampled
from training.tasks import TASKS

SAMPLE_ROWS = 1000


class BackboneCandidate(BaseModel, frozen=True):
    """One backbone and how its head did out of fold; `problem` is why it could not be tried.

    `loss` is how many nats a row it is worse than the best, `loss_error` the standard error.
    """

    model: str
    problem: str | None = None
    dim: int = 0
    accuracy: float | None = None
    nll: float | None = None
    loss: float | None = None
    loss_error: float | None = None


class BackboneChoice(BaseModel, frozen=True):
    """The backbone that was taken of the candidates, and why: a line of the report."""

    model: str
    reason: str
    rows: int
    candidates: tuple[BackboneCandidate, ...]


@dataclass(frozen=True)
class _Tried:
    model: str
    dim: int
    accuracy: float | None
    likelihoods: npt.NDArray[np.float64]


def choose_backbone(
    models: Sequence[str],
    features: Callable[[str, Dataset], FloatArray | None],
    data: Dataset,
    seed: int,
) -> BackboneChoice:
    """Return the best of `models`, of equal ones the first; None features are another modality.

    Raises `DataError` if there is no backbone for the data.
    """
    sample = sampled(data, seed, most=SAMPLE_ROWS)
    task, labels = TASKS[data.manifest.task], data.manifest.classes
    targets = sample.targets(labels, param="training_file")
    copies = twins(sample.items)
    tried: list[_Tried] = []
    failed: list[BackboneCandidate] = []
    for model in models:
        try:
            found = features(model, sample)
            if found is None:
                continue
            fitted = task.fit(found, targets, len(labels), seed, copies)
        except DataError as error:
            failed.append(BackboneCandidate(model=model, problem=error.message))
            continue
        chosen = next(each for each in fitted.candidates if each.strength == fitted.strength)
        rows = task.likelihoods(fitted.out_of_fold, targets)
        tried.append(_Tried(model, found.shape[1], chosen.accuracy, rows))
    if not tried:
        why = "; ".join(f"{each.model}: {each.problem}" for each in failed)
        raise DataError(
            f"no backbone here reads {data.manifest.modality} rows" + (f" ({why})" if why else ""),
            param="model",
        )
    return _choice(tried, failed, len(targets))


def _choice(tried: list[_Tried], failed: list[BackboneCandidate], rows: int) -> BackboneChoice:
    best = max(tried, key=lambda each: float(each.likelihoods.mean()))
    losses = [compare(best.likelihoods, each.likelihoods) for each in tried]
    # The best itself loses nothing, so there is always one.
    taken = next(i for i, loss in enumerate(losses) if not loss.counts)
    candidates = [
        BackboneCandidate(
            model=each.model, dim=each.dim, accuracy=each.accuracy,
            nll=-float(each.likelihoods.mean()), loss=loss.mean, loss_error=loss.error,
        )
        for each, loss in zip(tried, losses, strict=True)
    ]  # fmt: skip
    if len(tried) == 1:
        reason = "the only one that reads the data"
    elif tried[taken] is best:
        reason = f"the best of {len(tried)} by cross-validated likelihood"
    else:
        reason = f"the first in order within one standard error of the best, {best.model}"
    return BackboneChoice(
        model=tried[taken].model, reason=reason, rows=rows, candidates=(*candidates, *failed)
    )
