"""Which precision a job's trunk has: as asked for, or, with `auto`, int8 if measurably as good.

    fp32 trunk ─▶ features ─▶ fit ─▶ accuracy ─┐
    int8 trunk ─▶ features ─▶ fit ─▶ accuracy ─┴─▶ int8 unless 0.5 points or more are lost

Each head is fitted on the trunk it would run on, with the same folds, and judged on the validation
file's rows if there are any, or else out of fold. Of large data a stratified sample is compared, so
the choice takes a bounded time; with few rows one row may be worth more than 0.5 points, and
then no row more may be lost. The feature cache keeps what is computed here for the job itself.

Not here: what int8 is (training.quantization), making trunks (training.trunks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import BaseModel

from core.datasets import Task
from core.jobs import FineTuneRequest
from core.manifests import Precision
from core.preprocessing import FloatArray
from core.trunk import Trunk
from training.data import Dataset, group
from training.duplicates import twins
from training.fit import IntArray, fit
from training.quantization import is_quantisable

LARGEST_LOSS = 0.005
"""Accuracy that int8 must lose less of."""

SAMPLE_ROWS = 2000
"""At most so many rows of the training file, and of the validation file, are compared."""


class Choice(BaseModel, frozen=True):
    """Which precision `auto` came to and why: a line of the report.

    The accuracies are of `rows` rows, None if nothing had to be measured.
    """

    precision: Precision
    reason: str
    rows: int = 0
    fp32_accuracy: float | None = None
    int8_accuracy: float | None = None


@dataclass(frozen=True)
class Candidates:
    """How a job gets trunks and their features, and the rows to compare on."""

    open_trunk: Callable[[Precision], Trunk]
    extract: Callable[[Trunk, Dataset], FloatArray]
    train: Dataset
    held_out: Dataset | None


def choose(request: FineTuneRequest, candidates: Candidates) -> tuple[Trunk, Choice | None]:
    """Return the job's trunk, and the choice if there was one.

    Raises what opening a trunk raises: a `DataError` with `param="precision"` when the backbone
    cannot have the precision that was asked for.
    """
    if request.precision != "auto":
        return candidates.open_trunk(request.precision), None
    fp32 = candidates.open_trunk("fp32")
    if request.strategy == "full":
        reason = "a backbone that is tuned as a whole is served as it was trained"
        return fp32, Choice(precision="fp32", reason=reason)
    if not is_quantisable(fp32.manifest.slots):
        reason = "the backbone's blocks have no linear layers, which is what int8 makes faster"
        return fp32, Choice(precision="fp32", reason=reason)
    if candidates.train.manifest.task in (Task.MULTI_LABEL, Task.REGRESSION):
        reason = (
            "int8 is measured by the accuracy of one class a row, which this data does not have"
        )
        return fp32, Choice(precision="fp32", reason=reason)
    int8 = candidates.open_trunk("int8")
    sample = replace(
        candidates,
        train=sampled(candidates.train, request.seed),
        held_out=candidates.held_out and sampled(candidates.held_out, request.seed),
    )
    before, after = (_accuracy(trunk, sample, request.seed) for trunk in (fp32, int8))
    # Rounded, for 0.5 points of exactly that many rows are not less than 0.5 points.
    lost = round(before - after, 9)
    precision: Precision = "int8" if lost < LARGEST_LOSS else "fp32"
    choice = Choice(
        precision=precision,
        reason=f"int8 loses {100 * lost:.2f} points of accuracy"
        if lost > 0
        else "int8 loses no accuracy",
        rows=(sample.held_out or sample.train).manifest.rows,
        fp32_accuracy=before,
        int8_accuracy=after,
    )
    return (int8 if precision == "int8" else fp32), choice


def sampled(data: Dataset, seed: int, *, most: int = SAMPLE_ROWS) -> Dataset:
    """Return at most so many rows: of each class its share, and two if it has them."""
    if len(data.items) <= most:
        return data
    groups = group(data.manifest.task, data.targets(data.manifest.classes, param=""))
    rows = stratified(groups.tolist(), most, seed)
    return replace(
        data,
        manifest=data.manifest.model_copy(update={"rows": len(rows)}),
        items=[data.items[row] for row in rows],  # type: ignore[arg-type]  # of one kind
        answers=[data.answers[row] for row in rows],
    )


def stratified(labels: Sequence[str] | Sequence[int], most: int, seed: int) -> list[int]:
    """Return at most `most` row numbers, ascending, drawn from the classes by their share.

    Rows are taken in the order of their place within their class, shuffled, divided by its size: a
    prefix of that order holds about the same part of every class, and small classes come first.
    """
    if len(labels) <= most:
        return list(range(len(labels)))
    numbers = np.random.default_rng(seed)
    _, classes, counts = np.unique(np.array(labels), return_inverse=True, return_counts=True)
    shuffled = numbers.permutation(len(labels))
    places = np.empty(len(labels))
    for label, count in enumerate(counts):
        places[shuffled[classes[shuffled] == label]] = np.arange(count)
    # Two of each class go before the shares: what is seen once can be fitted or judged, not both.
    order = np.lexsort((shuffled, places / counts[classes], places >= 2))
    return sorted(int(row) for row in order[:most])


def _accuracy(trunk: Trunk, data: Candidates, seed: int) -> float:
    """Return the accuracy of a head fitted on this trunk's features, on rows it has not seen."""
    labels = data.train.manifest.classes
    targets: IntArray = data.train.targets(labels, param="training_file")
    fitted = fit(
        data.extract(trunk, data.train), targets, len(labels), seed=seed,
        twins=twins(data.train.items),
    )  # fmt: skip
    probabilities = fitted.out_of_fold
    if data.held_out is not None:
        targets = data.held_out.targets(labels, param="validation_file")
        probabilities = fitted.head.predict(data.extract(trunk, data.held_out))
    return float((probabilities.argmax(axis=1) == targets).mean())
