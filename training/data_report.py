"""What a person should know of a data set before trusting a model that was fitted on it.

Made of the rows and their features, before the fit: class counts, duplicates, labels that
contradict each other, training rows that are in the validation file too, outliers, and texts of
which the backbone does not read the end. Lists are cut to `LISTED` rows, totals are not. Rows are
numbered from 1 as in the file, without images that could not be read, which ingest has left out and
named. Not here: likely label errors, which need the fit (training.label_errors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from core.datasets import RowError
from core.jobs import Json
from core.preprocessing import FloatArray, TextPreprocessor
from core.trunk import Trunk
from training import duplicates
from training.duplicates import Match
from training.fit import FOLDS, IntArray

LISTED = 50
SHOWN_CHARS = 200
FEW_ROWS = 5
"""A class with fewer rows than this is worth a word."""

_OUTLIER_DEVIATIONS = 4.0
_MAD_TO_DEVIATION = 1.4826


class RowPair(BaseModel, frozen=True):
    """Two rows that are the same or nearly; `similarity` is a cosine, `row` the later one.

    In a leak, `row` is of the validation file and `other` of the training file.
    """

    row: int
    other: int
    similarity: float
    label: str
    other_label: str
    text: str | None = None


class Pairs(BaseModel, frozen=True):
    """How many rows repeat another, how many exactly, or under another label, and the first few."""

    rows: int
    exact: int
    conflicting: int
    examples: tuple[RowPair, ...]


class Outlier(BaseModel, frozen=True):
    """A row far from the others of its class: `distance` is 1 - cosine to their mean."""

    row: int
    label: str
    distance: float
    text: str | None = None


class Outliers(BaseModel, frozen=True):
    """How many rows are further from their class than `threshold`, and the furthest."""

    rows: int
    threshold: float
    examples: tuple[Outlier, ...]


class Truncation(BaseModel, frozen=True):
    """Texts of which only the first `max_tokens` tokens are read; None where there is no limit."""

    rows: int
    max_tokens: int
    examples: tuple[int, ...]


class DataReport(BaseModel, frozen=True):
    """What was found in the training file, and between it and the validation file.

    `leaks` is None without a validation file, `truncated` for images, `imbalance` for values, which
    have no `counts` either. `compared_rows` says how many rows the search for near duplicates
    looked at. `unreadable` images were left out of the rows, and do not count in row numbers.
    """

    rows: int
    counts: dict[str, int]
    imbalance: float | None
    classes_with_few_rows: tuple[str, ...]
    duplicates: Pairs
    near_duplicates: Pairs
    near_threshold: float
    compared_rows: int
    leaks: Pairs | None
    outliers: Outliers
    truncated: Truncation | None
    unreadable: tuple[RowError, ...] = ()

    def summary(self) -> Json:
        """Return the counts alone, for an event."""
        return {
            "rows": self.rows,
            "classes": len(self.counts),
            "imbalance": None if self.imbalance is None else round(self.imbalance, 2),
            "classes_with_few_rows": len(self.classes_with_few_rows),
            "duplicates": self.duplicates.rows,
            "near_duplicates": self.near_duplicates.rows,
            "conflicting_labels": self.duplicates.conflicting + self.near_duplicates.conflicting,
            "leaked_rows": self.leaks.rows if self.leaks else 0,
            "outliers": self.outliers.rows,
            "truncated": self.truncated.rows if self.truncated else 0,
            "unreadable": len(self.unreadable),
        }


@dataclass(frozen=True)
class Inspection:
    """The report, and for each training row the first that it repeats, nearly or not: `twins` [n].

    Rows that repeat none are their own.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    report: DataReport
    twins: IntArray


@dataclass(frozen=True)
class RowSet:
    """One file's rows as the report sees them: items, their features [n, dim], and their labels.

    A label is what was said of the row, in words. Of `values` [n] only those contradict each other
    that differ by more than `deviation`.
    """

    items: Sequence[str] | Sequence[bytes]
    features: FloatArray
    labels: Sequence[str]
    values: npt.NDArray[np.float64] | None = None
    deviation: float = 0.0


def inspect_data(
    train: RowSet, groups: IntArray, held_out: RowSet | None, trunk: Trunk,
    counts: Mapping[str, int] | None = None, unreadable: tuple[RowError, ...] = (),
) -> Inspection:  # fmt: skip
    """Look at the training rows, and at the validation file's against them.

    `groups` [n] are of rows that are alike. `counts` is by label, where a row may have several or
    none; without it every row has one. `unreadable` are those that were left out.
    """
    centre = train.features.mean(axis=0, dtype=np.float64).astype(np.float32)
    units = duplicates.unit_rows(train.features, centre)
    keys = [duplicates.content_key(item) for item in train.items]
    same = duplicates.repeats(keys)
    is_repeat = np.zeros(len(keys), np.bool_)
    is_repeat[[match.row for match in same]] = True
    threshold = duplicates.NEAR[trunk.modality]
    compared = duplicates.sample_rows(len(keys))
    compared = compared[~is_repeat[compared]]
    near = [
        Match(int(compared[match.row]), int(compared[match.other]), match.similarity)
        for match in duplicates.near_repeats(units[compared], threshold)
    ]
    leaks = None
    if held_out is not None:
        other_keys = [duplicates.content_key(item) for item in held_out.items]
        leaked = duplicates.repeats(other_keys, keys)
        known = {match.row for match in leaked}
        asked = duplicates.sample_rows(len(other_keys))
        asked = asked[[int(row) not in known for row in asked]]
        others = duplicates.unit_rows(held_out.features, centre)
        leaked += [
            Match(int(asked[match.row]), int(compared[match.other]), match.similarity)
            for match in duplicates.near_matches(others[asked], units[compared], threshold)
        ]
        leaks = _pairs(leaked, held_out, train)
    if counts is None:
        counts = dict(zip(*np.unique(train.labels, return_counts=True), strict=True))
    sizes = list(counts.values())
    report = DataReport(
        rows=len(keys),
        counts={str(label): int(rows) for label, rows in counts.items()},
        imbalance=float(max(sizes) / min(sizes)) if sizes else None,
        classes_with_few_rows=tuple(str(c) for c, rows in counts.items() if rows < FEW_ROWS),
        duplicates=_pairs(same, train, train),
        near_duplicates=_pairs(near, train, train),
        near_threshold=threshold,
        compared_rows=len(compared),
        leaks=leaks,
        outliers=_outliers(units, groups, train),
        truncated=_truncated(train.items, trunk),
        unreadable=unreadable,
    )
    first = np.arange(len(keys))
    first[[match.row for match in same]] = [match.other for match in same]
    # With a whole fold of a class or more in one group, no fold could know the class.
    most = np.maximum(2, np.bincount(groups)[groups] // FOLDS)
    return Inspection(report, duplicates.with_near(first, near, units, threshold, groups, most))


def describe(report: DataReport) -> str:
    """Return one sentence for the job's history."""
    truncated = report.truncated.rows if report.truncated else 0
    found = [
        f"{count} {words}"
        for count, words in (
            (report.leaks.rows if report.leaks else 0, "validation rows (nearly) in training too"),
            (report.duplicates.rows, "exact duplicates"),
            (report.near_duplicates.rows, "near duplicates"),
            (
                report.duplicates.conflicting + report.near_duplicates.conflicting,
                "duplicates under different labels",
            ),
            (len(report.classes_with_few_rows), "classes with very few rows"),
            (report.outliers.rows, "outliers"),
            (truncated, "texts longer than the backbone reads"),
            (len(report.unreadable), "unreadable images left out"),
        )
        if count
    ]
    rest = ", ".join(found) or "nothing that stands out"
    classes = f" of {len(report.counts)} classes" if report.counts else ""
    return f"{report.rows} rows{classes}: {rest}."


def shown(item: str | bytes) -> str | None:
    """Return the beginning of a text; None for an image."""
    if isinstance(item, bytes):
        return None
    text = " ".join(item.split())
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def _pairs(matches: Sequence[Match], rows: RowSet, others: RowSet) -> Pairs:
    def contradict(match: Match) -> bool:
        if rows.values is not None and others.values is not None:
            difference = rows.values[match.row] - others.values[match.other]
            return bool(abs(difference) > rows.deviation)
        return rows.labels[match.row] != others.labels[match.other]

    conflicting = [match for match in matches if contradict(match)]
    agreeing = [match for match in matches if not contradict(match)]
    return Pairs(
        rows=len(matches),
        exact=sum(m.is_exact for m in matches),
        conflicting=len(conflicting),
        examples=tuple(
            RowPair(
                row=match.row + 1,
                other=match.other + 1,
                similarity=round(match.similarity, 4),
                label=rows.labels[match.row],
                other_label=others.labels[match.other],
                text=shown(rows.items[match.row]),
            )
            for match in [*conflicting, *agreeing][:LISTED]
        ),
    )


def _outliers(units: FloatArray, targets: IntArray, rows: RowSet) -> Outliers:
    """Rows whose distance is 4 robust deviations above the median; classes of 3 rows or more."""
    classes = int(targets.max()) + 1
    counts = np.bincount(targets, minlength=classes)
    sums = np.zeros((classes, units.shape[1]), np.float32)
    np.add.at(sums, targets, units)
    # The mean of the others: with itself among few, a row would look near.
    others = sums[targets] - units
    lengths = np.maximum(np.linalg.norm(others, axis=1), 1e-12)
    distances = 1 - (units * others).sum(axis=1) / lengths
    judged = counts[targets] >= 3
    if not judged.any():
        return Outliers(rows=0, threshold=2.0, examples=())
    median = float(np.median(distances[judged]))
    deviation = _MAD_TO_DEVIATION * float(np.median(np.abs(distances[judged] - median)))
    threshold = median + _OUTLIER_DEVIATIONS * deviation
    # Rows that are all alike differ by rounding only.
    far = np.flatnonzero(judged & (distances > threshold + 1e-3))
    far = far[np.argsort(-distances[far], kind="stable")]
    return Outliers(
        rows=len(far),
        threshold=threshold,
        examples=tuple(
            Outlier(
                row=int(row) + 1,
                label=rows.labels[row],
                distance=round(float(distances[row]), 4),
                text=shown(rows.items[row]),
            )
            for row in far[:LISTED]
        ),
    )


def _truncated(items: Sequence[str] | Sequence[bytes], trunk: Trunk) -> Truncation | None:
    if not isinstance(trunk.preprocessor, TextPreprocessor):
        return None
    cut = trunk.preprocessor.truncated([str(item) for item in items])
    return Truncation(
        rows=len(cut),
        max_tokens=trunk.preprocessor.config.max_tokens,
        examples=tuple(row + 1 for row in cut[:LISTED]),
    )
