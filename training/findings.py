"""What stands out of a judged model: likely label errors, confusions, the worst errors, a verdict.

All of it is quick and pure: it sorts and words what was computed elsewhere. Lists are cut to
`LISTED`. Not here: what takes time (training.investigation), what the data alone tells
(training.data_report).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from core.manifests import GateOutcome
from core.tasks import Answer
from training.assessment import Assessment
from training.baselines import Transfer
from training.data import show
from training.data_report import FEW_ROWS, DataReport, RowSet, shown
from training.fit import IntArray
from training.label_errors import find_label_errors
from training.learning_curve import LearningCurve
from training.report import (
    Confusion,
    LabelError,
    LabelErrors,
    Verdict,
    WorstAnswer,
    WorstError,
)
from training.yardsticks import Standing

LISTED = 50
MAX_CONFUSIONS = 400
MANY_LABEL_ERRORS = 0.02
"""Share of the rows above which doubtful labels are a warning: a good data set has some."""

MANY_COPIES = 0.05
"""Share of the rows above which copies are worth a line."""

LARGE_CALIBRATION_ERROR = 0.1


def label_errors(
    assessment: Assessment, rows: RowSet, targets: IntArray, labels: Sequence[str]
) -> LabelErrors:
    """Return which of the training rows are likely labelled wrongly."""
    doubts = find_label_errors(assessment.out_of_fold, targets)
    return LabelErrors(
        rows=len(doubts),
        row_numbers=tuple(sorted(doubt.row + 1 for doubt in doubts)),
        examples=tuple(
            LabelError(
                row=doubt.row + 1,
                label=rows.labels[doubt.row],
                suggested=labels[doubt.suggested],
                margin=round(doubt.margin, 4),
                text=shown(rows.items[doubt.row]),
            )
            for doubt in doubts[:LISTED]
        ),
    )


def confusions(assessment: Assessment, labels: Sequence[str]) -> tuple[Confusion, ...]:
    """Return the commonest wrong answers, by label and answer."""
    width = len(labels)
    predicted = assessment.probabilities.argmax(axis=1)
    wrong = predicted != assessment.targets
    cells, sizes = np.unique(
        assessment.targets[wrong] * width + predicted[wrong], return_counts=True
    )
    order = np.argsort(-sizes, kind="stable")[:MAX_CONFUSIONS]
    return tuple(
        Confusion(
            label=labels[int(cells[n]) // width],
            predicted=labels[int(cells[n]) % width],
            rows=int(sizes[n]),
        )
        for n in order
    )


def worst_errors(
    assessment: Assessment, rows: RowSet, labels: Sequence[str]
) -> tuple[WorstError, ...]:
    """Return the wrong answers that the model was surest of; `rows` are the held-out ones."""
    probabilities = assessment.probabilities
    numbers = np.arange(len(rows.labels)) if assessment.rows is None else assessment.rows
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != assessment.targets)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:LISTED]
    return tuple(
        WorstError(
            row=int(numbers[row]) + 1,
            label=rows.labels[numbers[row]],
            predicted=labels[int(predicted[row])],
            confidence=round(float(confidence[row]), 4),
            label_probability=round(float(probabilities[row, assessment.targets[row]]), 4),
            text=shown(rows.items[numbers[row]]),
        )
        for row in worst
    )


def verdicts(
    assessment: Assessment,
    data: DataReport,
    transfer: Transfer,
    curve: LearningCurve,
    doubts: LabelErrors,
    gate: GateOutcome | None,
    *,
    is_tuned: bool,
) -> tuple[Verdict, ...]:
    """Return what somebody who reads five lines of the report should read.

    The curve is of the frozen head, also where a model that `is_tuned` ships.
    """
    return (
        *_on_the_gate(gate),
        *_on_the_model(assessment, transfer),
        *_on_the_data(data, doubts),
        _on_more_data(curve, is_tuned=is_tuned),
    )


def other_verdicts(
    standing: Standing, data: DataReport, gate: GateOutcome | None, warnings: Sequence[str]
) -> tuple[Verdict, ...]:
    """Return the same of several labels or values; `warnings` are what the task adds."""
    return (
        *_on_the_gate(gate),
        *_on_the_standing(standing),
        *(_warn(warning) for warning in warnings),
        *_on_the_data(data, None),
    )


def worst_answers(
    losses: npt.NDArray[np.float64], truth: Sequence[Answer], answers: Sequence[Answer],
    rows: RowSet, numbers: IntArray | None = None,
) -> tuple[WorstAnswer, ...]:  # fmt: skip
    """Return the rows of the largest losses [n], of those that were not answered rightly.

    They are those of `rows` that have these `numbers` [n]; None for all.
    """
    places = np.arange(len(losses)) if numbers is None else numbers
    order = np.argsort(-losses, kind="stable")
    wrong = [int(row) for row in order if truth[row] != answers[row]][:LISTED]
    return tuple(
        WorstAnswer(
            row=int(places[row]) + 1,
            truth=show(truth[row]),
            answer=show(answers[row]),
            loss=float(losses[row]),
            text=shown(rows.items[places[row]]),
        )
        for row in wrong
    )


def _on_the_standing(standing: Standing) -> Iterator[Verdict]:
    if standing.advice is not None:
        yield _warn(standing.advice)
    elif standing.scratch_score is not None:
        yield _good(
            f"The mean {standing.measure} is {standing.model:.4g}, against "
            f"{standing.scratch_score:.4g} of {standing.scratch} on the same rows."
        )


def _on_the_gate(gate: GateOutcome | None) -> Iterator[Verdict]:
    if gate is not None and gate.passed:
        yield _good("The quality gate was passed.")
    elif gate is not None:
        yield _warn(f"The quality gate was not passed: {'; '.join(gate.reasons)}.")


def _on_the_model(assessment: Assessment, transfer: Transfer) -> Iterator[Verdict]:
    if transfer.advice is not None:
        yield _warn(transfer.advice)
    elif transfer.gain is not None and transfer.gain_error is not None:
        yield _good(
            f"The pretrained model is right {100 * transfer.gain:.1f} ± "
            f"{100 * transfer.gain_error:.1f} points more often than {transfer.scratch} "
            "on the same rows."
        )
    metrics = assessment.metrics
    drop = assessment.cross_validated_accuracy - metrics.accuracy
    if assessment.source == "validation_file" and drop > 3 * max(metrics.accuracy_error, 0.01):
        yield _warn(
            f"On held-out rows of the training file the accuracy is {100 * drop:.0f} points higher "
            "than on the validation file: the two differ in kind, or the training file has rows "
            "that are nearly alike."
        )
    error = assessment.calibration.after.ece
    if error > LARGE_CALIBRATION_ERROR:
        yield _warn(f"Probabilities are off by {100 * error:.0f} points on average.")


def _on_the_data(data: DataReport, doubts: LabelErrors | None) -> Iterator[Verdict]:
    if data.leaks is not None and data.leaks.rows:
        yield _warn(
            f"{data.leaks.rows} rows of the validation file are in the training file too, "
            f"{data.leaks.exact} exactly and the others nearly: the metrics flatter the model."
        )
    if doubts is not None and doubts.rows:
        share = doubts.rows / data.rows
        yield Verdict(
            level="warn" if share > MANY_LABEL_ERRORS else "note",
            text=f"{doubts.rows} labels ({100 * share:.1f} %) are likely wrong or ambiguous; the "
            "first are listed below.",
        )
    copies = data.duplicates.rows + data.near_duplicates.rows
    if copies > MANY_COPIES * data.rows:
        yield _warn(
            f"{copies} rows ({100 * copies / data.rows:.0f} %) repeat another, "
            f"{data.duplicates.rows} exactly. No row is judged by a head that has seen its copy, "
            "but what is often repeated weighs more in every figure: remove copies that are not "
            "as frequent where the model will be used."
        )
    conflicts = data.duplicates.conflicting + data.near_duplicates.conflicting
    if conflicts:
        yield _note(f"{conflicts} rows repeat another row under a different label or value.")
    if data.classes_with_few_rows:
        named = ", ".join(data.classes_with_few_rows[:5])
        yield _warn(
            f"{len(data.classes_with_few_rows)} classes have fewer than {FEW_ROWS} rows, such as "
            f"{named}: what is said of them is not reliable."
        )
    if data.unreadable:
        yield _note(f"{len(data.unreadable)} images could not be read and were left out.")
    if data.truncated is not None and data.truncated.rows:
        yield _note(
            f"Of {data.truncated.rows} texts only the first {data.truncated.max_tokens} tokens "
            "are read."
        )


def _on_more_data(curve: LearningCurve, *, is_tuned: bool) -> Verdict:
    whom = " the frozen head, by which this is told" if is_tuned else ""
    if curve.more_data_helps:
        gain = 100 * curve.next_gain
        return _note(f"More data would help{whom}: twice the rows may add up to {gain:.1f} points.")
    return _note(f"More rows of the same kind are not likely to help{whom or ' much'}.")


def _good(text: str) -> Verdict:
    return Verdict(level="good", text=text)


def _note(text: str) -> Verdict:
    return Verdict(level="note", text=text)


def _warn(text: str) -> Verdict:
    return Verdict(level="warn", text=text)
