"""Reading a processed data set back: rows and what is to be said of them, in the file's order.

Also here: what a task's learning takes of it, as numbers. *Targets* are class indices [n], 0 or 1
for each label [n, labels], or values [n]. *Groups* [n] are rows that are alike: of one class, of
one rarest label (Sechidis, Tsoumakas & Vlahavas 2011 deal the rarest first too), or of one fifth of
the values. Folds and samples have their share of each group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from core.datasets import (
    TARGET_COLUMNS,
    DatasetManifest,
    FileErrors,
    Modality,
    Task,
    ValueRange,
)
from core.errors import DataError
from core.files import FileStore
from core.tasks import VALUE_GROUPS, Answer

Targets = npt.NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """A data set: texts or encoded images, and the right answer to each."""

    file: str
    manifest: DatasetManifest
    items: list[str] | list[bytes]
    answers: Sequence[Answer]

    def targets(self, labels: Sequence[str], *, param: str) -> Targets:
        """Return each row's target by `labels`; raise `DataError` for a label not among them."""
        if self.manifest.task is Task.REGRESSION:
            return np.array(self.answers, np.float64)
        index = {label: number for number, label in enumerate(labels)}
        rows = [row if isinstance(row, frozenset) else {row} for row in self.answers]
        unknown = sorted(set().union(*rows) - index.keys(), key=str)
        if unknown:
            shown = ", ".join(repr(label) for label in unknown[:5])
            raise DataError(f"labels that the training file does not have: {shown}", param=param)
        if self.manifest.task is Task.SINGLE_LABEL:
            return np.array([index[str(label)] for label in self.answers], np.int64)
        matrix = np.zeros((len(rows), len(labels)), np.float32)
        for number, row in enumerate(rows):
            matrix[number, [index[str(label)] for label in row]] = 1
        return matrix

    @property
    def shown(self) -> list[str]:
        """The answers as a person reads them."""
        return [show(answer) for answer in self.answers]


def show(answer: Answer) -> str:
    """Return an answer as a person reads it."""
    if isinstance(answer, frozenset):
        return ", ".join(sorted(answer)) or "no label"
    return answer if isinstance(answer, str) else f"{answer:.6g}"


def group(task: Task, targets: Targets) -> npt.NDArray[np.int64]:
    """Return the group of each row, [n]; how many there can be is `core.tasks.group_count`."""
    if task is Task.REGRESSION:
        bounds = np.quantile(targets, np.linspace(0, 1, VALUE_GROUPS + 1)[1:-1])
        return np.searchsorted(bounds, targets, side="right").astype(np.int64)
    if task is Task.MULTI_LABEL:
        counts = targets.sum(axis=0)
        rarity = np.where(targets > 0, counts, np.inf)
        without = targets.shape[1]
        found: npt.NDArray[np.int64] = np.where(
            targets.any(axis=1), rarity.argmin(axis=1), without
        ).astype(np.int64)
        return found
    return targets


def count_labels(answers: Sequence[Answer]) -> dict[str, int]:
    """Return how many rows have each label; none for values."""
    counts: Counter[str] = Counter()
    for answer in answers:
        if isinstance(answer, frozenset):
            counts.update(answer)
        elif isinstance(answer, str):
            counts[answer] += 1
    return dict(counts)


def spread(answers: Sequence[Answer]) -> ValueRange | None:
    """Return how values are spread; None for labels."""
    values = np.array([answer for answer in answers if isinstance(answer, float)])
    if not len(values):
        return None
    return ValueRange(
        low=float(values.min()),
        high=float(values.max()),
        mean=float(values.mean()),
        deviation=float(values.std()),
    )


def read_dataset(files: FileStore, file_id: str, *, param: str) -> Dataset:
    """Read a processed file; raise `DataError` naming `param` when it is not, or was damaged."""
    _, outcome = files.status(file_id)
    if isinstance(outcome, FileErrors):
        raise DataError(f"{file_id} is unusable: {outcome.summary()}", param=param)
    if outcome is None:
        raise DataError(f"{file_id} has not been processed", param=param)
    if not files.is_intact(file_id, outcome):
        raise DataError(f"what is stored of {file_id} is damaged; upload it again", param=param)
    column, target = outcome.modality.value, TARGET_COLUMNS[outcome.task]
    with files.open_data(file_id) as source:
        table = pq.read_table(source, columns=[column, target])
    values = table.column(column).to_pylist()
    items = values if outcome.modality is Modality.TEXT else [value["bytes"] for value in values]
    answers = table.column(target).to_pylist()
    if outcome.task is Task.MULTI_LABEL:
        answers = [frozenset(labels) for labels in answers]
    return Dataset(file_id, outcome, items, answers)
