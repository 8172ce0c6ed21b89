"""What the four tasks give, and what a job may ask of them.

    task            head.onnx ends in    a row's answer
    single_label    softmax              the likeliest class
    multi_label     sigmoid              every label whose probability reaches `THRESHOLD`
    ordinal         softmax              the likeliest class; labels are in their order
    regression      nothing              the value

The column of the data decides, and for `ordinal` the job's `order`. Not here: how heads are fitted
and judged (training.tasks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from core.datasets import TARGET_COLUMNS, DatasetManifest, Task
from core.jobs import FineTuneRequest
from core.preprocessing import FloatArray

Output = Literal["softmax", "sigmoid", "identity"]
OUTPUTS: dict[Task, Output] = {
    Task.SINGLE_LABEL: "softmax",
    Task.MULTI_LABEL: "sigmoid",
    Task.ORDINAL: "softmax",
    Task.REGRESSION: "identity",
}

OUTPUT_NAMES: dict[Output, str] = {
    "softmax": "probabilities",
    "sigmoid": "probabilities",
    "identity": "value",
}

VALUE_GROUPS = 5
"""Into as many groups of about as many rows the values of a regression are sorted."""

THRESHOLD = 0.5
"""Of calibrated probabilities: a label is given where it is likelier than not."""

Answer = str | frozenset[str] | float


class Refusal(NamedTuple):
    """Why a job cannot be done on its data: the field at fault, and a sentence."""

    param: str
    message: str


def activate(output: Output, logits: FloatArray) -> FloatArray:
    """Turn logits [n, width] into what the head gives, in place."""
    if output == "softmax":
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
    elif output == "sigmoid":
        # 1 / (1 + exp(-x)), which a large -x would overflow.
        np.tanh(0.5 * logits, out=logits)
        logits += 1
        logits *= 0.5
    return logits


def group_count(task: Task, labels: int) -> int:
    """Return into how many groups of alike rows the data of a task falls (training.data)."""
    if task is Task.REGRESSION:
        return VALUE_GROUPS
    return labels + 1 if task is Task.MULTI_LABEL else labels


def golden_unit(expected: FloatArray, bias: FloatArray) -> float:
    """Return in what unit values are compared with recorded ones, since they may be of any size.

    It is how far the values are from the bias, or where they hardly are, a hundredth of the bias,
    of which float32 keeps seven digits.
    """
    size = np.abs(expected - bias).max(initial=0.0) + 0.01 * np.abs(bias).max(initial=0.0)
    return float(size) or 1.0


def decide(task: Task, outputs: FloatArray, labels: Sequence[str]) -> list[Answer]:
    """Return the answer of each row of a head's `outputs` [n, width]."""
    if task is Task.REGRESSION:
        return [float(value) for value in outputs[:, 0]]
    if task is Task.MULTI_LABEL:
        return [
            frozenset(labels[int(i)] for i in np.flatnonzero(row >= THRESHOLD)) for row in outputs
        ]
    return [labels[index] for index in outputs.argmax(axis=1)]


def task_of(data: DatasetManifest, order: Sequence[str] | None) -> Task:
    """Return a job's task: that of its data, or `ordinal` if it gives the classes an order."""
    is_ordered = order is not None and data.task is Task.SINGLE_LABEL
    return Task.ORDINAL if is_ordered else data.task


def find_refusal(request: FineTuneRequest, data: DatasetManifest | None) -> Refusal | None:
    """Return why a job cannot be done on its training data, None if it can.

    Without the data, which may not be parsed yet, only what no data would allow is found.
    """
    order = request.order
    if request.strategy == "full" and request.precision == "int8":
        return Refusal(
            "precision", "a backbone that is tuned as a whole is served in fp32; use 'fp32'"
        )
    if order is not None and data is not None:
        if data.task is not Task.SINGLE_LABEL:
            return Refusal(
                "order",
                "an order is of the classes of a 'label' column, and the training file has "
                f"{TARGET_COLUMNS[data.task]!r}; leave it out",
            )
        if set(order) != set(data.counts):
            return Refusal("order", _order_problem(order, data.classes))
    is_regression = data is not None and data.task is Task.REGRESSION
    if request.quality_gate is not None and is_regression:
        return Refusal(
            "quality_gate",
            "the gate judges accuracy, which a regression does not have; leave it out",
        )
    return None


def find_other_task(parent: Task, data: DatasetManifest) -> str | None:
    """Return why data cannot continue a model of the task `parent`, None if it can."""
    task = Task.SINGLE_LABEL if parent is Task.ORDINAL else parent
    if data.task is task:
        return None
    return (
        f"it was fitted on a column {TARGET_COLUMNS[task]!r}, and the training file has "
        f"{TARGET_COLUMNS[data.task]!r}"
    )


def find_mismatch(train: DatasetManifest, held_out: DatasetManifest) -> str | None:
    """Return why the rows of one file cannot judge a model of the other's, None if they can."""
    if held_out.modality is not train.modality:
        return (
            f"the training file holds {train.modality} rows and the validation file "
            f"{held_out.modality}"
        )
    if held_out.task is not train.task:
        return (
            f"the training file has a column {TARGET_COLUMNS[train.task]!r} and the validation "
            f"file {TARGET_COLUMNS[held_out.task]!r}"
        )
    unknown = sorted(held_out.counts.keys() - train.counts.keys())
    if unknown:
        return f"labels that the training file does not have: {_listed(unknown)}"
    return None


def _order_problem(order: Sequence[str], classes: Sequence[str]) -> str:
    missing = sorted(set(classes) - set(order))
    if missing:
        return f"the order leaves out {_listed(missing)}; name every class, lowest first"
    unknown = [label for label in order if label not in classes]
    return f"no row has the label {_listed(unknown)}; name the classes of the data only"


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(repr(label) for label in labels[:5])
