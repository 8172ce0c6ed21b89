"""What is to be said of the rows: which column has it, how it is checked, and what rows need of it.

    label     one class: at least two classes of two rows; labels of one type
    labels    any number of classes: each on two rows at least, and not on two
    value     a number: at least ten rows, not all the same

A file has one of the three. `label` is taken if it is there, whatever else is.

A `Tally` takes the targets of one upload row by row and judges them in the end, and only if each
could be read: otherwise a class may look short of rows because of an error that is reported
already. Not here: where the values come from (the parsers).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from core.datasets import TARGET_COLUMNS, RowError, Task, ValueRange
from training.ingest.findings import shown, shown_names
from training.ingest.limits import MAX_LABELS_OF_ROW, MAX_VALUE
from training.ingest.rows import Row, Unusable, check_label, kind

SEPARATOR = "|"
"""Between the labels of a CSV field."""

FEWEST_VALUES = 10
"""With fewer, no interval can be told that nine in ten new values would be in."""

Target = str | list[str] | float

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")


def find_task(columns: Sequence[str]) -> Task | Unusable:
    """Return the task of a file with these columns, or why they leave it open."""
    found = [task for task, column in TARGET_COLUMNS.items() if column in columns]
    if Task.SINGLE_LABEL in found or not found:
        return Task.SINGLE_LABEL
    if len(found) > 1:
        return Unusable(
            "there are both 'labels' and 'value'; remove the one that is not to be predicted"
        )
    return found[0]


def split_labels(field: str) -> list[str]:
    """Return the labels of a CSV field; a blank field has none."""
    return field.split(SEPARATOR) if field.strip() else []


def read_number(field: str) -> float | Unusable:
    """Return the number that a CSV field spells."""
    text = field.strip()
    if _NUMBER.fullmatch(text):
        return float(text)
    if not text:
        return Unusable("the value is blank; fill it in or remove the row")
    return Unusable(f"the value {shown(text)} is not a number such as 3.5; write it with a point")


class Tally(Protocol):
    """The targets of one upload, as they come and as a whole."""

    counts: dict[str, int]

    def take(self, row: Row) -> Target | Unusable:
        """Return a row's target in its final form, and count it."""

    def problems(self, rows: int) -> Iterator[RowError]:
        """Yield what is wrong with all `rows` targets together."""

    def values(self) -> ValueRange | None:
        """Return how the values are spread, if the targets are values."""


class LabelTally:
    """One class for each row."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first_of_type: dict[bool, str] = {}

    def take(self, row: Row) -> Target | Unusable:
        """Return the label."""
        label = check_label(row.target)
        if isinstance(label, Unusable):
            return label
        self.counts[label] = self.counts.get(label, 0) + 1
        is_integer = isinstance(row.target, int)
        if is_integer not in self._first_of_type:
            self._first_of_type[is_integer] = row.place
            if len(self._first_of_type) == 2:
                return Unusable(self._mixed_types(row, label))
        return label

    def problems(self, rows: int) -> Iterator[RowError]:
        """Yield a want of rows or classes."""
        singles = _singles(self.counts)
        if rows < 2:
            reason = f"the file has {_few(rows)}; at least 2 classes of 2 rows are needed"
        elif len(self.counts) == 1:
            only = shown(next(iter(self.counts)))
            reason = f"all {rows} rows have the label {only}; add rows of at least one other class"
        elif singles:
            reason = _too_few_rows(singles)
        else:
            return
        yield RowError(reason=reason)

    def values(self) -> None:
        """Labels have no range."""

    def _mixed_types(self, row: Row, label: str) -> str:
        here, there = ("a string", "an integer")
        if isinstance(row.target, int):
            here, there = there, here
        other = self._first_of_type[not isinstance(row.target, int)]
        return (
            f"the label {shown(label)} is {here} at {row.place} but {there} at {other}; "
            "use one type in the whole file, for example all strings"
        )


class LabelListTally:
    """Any number of classes for each row."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def take(self, row: Row) -> Target | Unusable:
        """Return the labels, sorted."""
        given = row.target
        if isinstance(given, Unusable):
            return given
        if given is None:
            return Unusable("the labels are null; write an empty list if the row has none")
        if not isinstance(given, list):
            return Unusable(f"the labels must be a list of strings, not {kind(given)}")
        if len(given) > MAX_LABELS_OF_ROW:
            return Unusable(
                f"there are {len(given)} labels; at most {MAX_LABELS_OF_ROW} are allowed"
            )
        labels = []
        for each in given:
            label = check_label(each)
            if isinstance(label, Unusable):
                return label
            if label in labels:
                return Unusable(f"the label {shown(label)} is there twice; remove one")
            labels.append(label)
        for label in labels:
            self.counts[label] = self.counts.get(label, 0) + 1
        return sorted(labels)

    def problems(self, rows: int) -> Iterator[RowError]:
        """Yield a want of rows, labels, or rows without a label."""
        singles = _singles(self.counts)
        common = sorted(label for label, count in self.counts.items() if rows - count < 2)
        if rows < 4:
            reason = f"the file has {_few(rows)}; at least 4 are needed"
        elif not self.counts:
            reason = f"none of the {rows} rows has a label; add rows that have"
        elif singles:
            reason = _too_few_rows(singles)
        elif common:
            reason = (
                f"fewer than two rows are without {shown_names(common)}; "
                "add rows that do not have it, or remove the label"
            )
        else:
            return
        yield RowError(reason=reason)

    def values(self) -> None:
        """Labels have no range."""


class ValueTally:
    """A number for each row; the spread is taken as they come (Welford 1962)."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._rows = 0
        self._low, self._high = math.inf, -math.inf
        self._mean = self._squares = 0.0

    def take(self, row: Row) -> Target | Unusable:
        """Return the value."""
        value = _check_value(row.target)
        if isinstance(value, Unusable):
            return value
        self._rows += 1
        self._low, self._high = min(self._low, value), max(self._high, value)
        difference = value - self._mean
        self._mean += difference / self._rows
        self._squares += difference * (value - self._mean)
        return value

    def problems(self, rows: int) -> Iterator[RowError]:
        """Yield a want of rows, or of anything to tell apart."""
        if rows < FEWEST_VALUES:
            yield RowError(reason=f"the file has {_few(rows)}; at least {FEWEST_VALUES} are needed")
        elif self._low == self._high:
            yield RowError(
                reason=f"all {rows} rows have the value {self._low:g}; add rows of other values"
            )

    def values(self) -> ValueRange | None:
        """Return the range, the mean and the standard deviation."""
        return ValueRange(
            low=self._low,
            high=self._high,
            mean=self._mean,
            deviation=math.sqrt(self._squares / self._rows),
        )


TALLIES: dict[Task, type[LabelTally | LabelListTally | ValueTally]] = {
    Task.SINGLE_LABEL: LabelTally,
    Task.MULTI_LABEL: LabelListTally,
    Task.REGRESSION: ValueTally,
}


def _check_value(value: object) -> float | Unusable:
    if isinstance(value, Unusable):
        return value
    if value is None:
        return Unusable("the value is null; fill it in or remove the row")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Unusable(f"the value must be a number, not {kind(value)}")
    if not abs(value) <= MAX_VALUE:
        return Unusable(
            f"the value must be a number of at most {MAX_VALUE:g}; correct it or remove the row"
        )
    return float(value)


def _singles(counts: dict[str, int]) -> list[str]:
    return sorted(label for label, count in counts.items() if count < 2)


def _too_few_rows(singles: Sequence[str]) -> str:
    classes = "class has" if len(singles) == 1 else "classes have"
    return (
        f"{len(singles)} {classes} only one row: {shown_names(singles)}; "
        "add at least one row to each or remove it"
    )


def _few(rows: int) -> str:
    return "no rows" if rows == 0 else f"only {rows} row{'s' if rows > 1 else ''}"
