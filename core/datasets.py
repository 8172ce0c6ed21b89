"""Data sets as both processes see them: the uploaded file, its normal form, and its errors.

The normal form is Parquet with two columns: `text` (string) or `image` (the Hugging Face image
struct `{bytes, path}`), and the column of the task: `label` (string), `labels` (list of strings) or
`value` (double). Not here: where they are kept (core.files), how an upload is parsed
(training.ingest).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, Field


class Modality(StrEnum):
    """What a row holds."""

    TEXT = "text"
    IMAGE = "image"


class Task(StrEnum):
    """What is to be said of a row; `TARGET_COLUMNS` has the column that decides.

    Ordinal data is single-label data until a job gives its classes an order.
    """

    SINGLE_LABEL = "single_label"
    MULTI_LABEL = "multi_label"
    ORDINAL = "ordinal"
    REGRESSION = "regression"


TARGET_COLUMNS = {
    Task.SINGLE_LABEL: "label",
    Task.MULTI_LABEL: "labels",
    Task.REGRESSION: "value",
}


class FileStatus(StrEnum):
    """OpenAI's file statuses."""

    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


class UploadedFile(BaseModel, frozen=True):
    """What is known of an upload once its bytes are stored. `created_at` is Unix seconds."""

    id: str
    filename: str
    bytes: int
    created_at: float
    purpose: str = "fine-tune"


class RowError(BaseModel, frozen=True):
    """One thing wrong with an upload.

    `line` is the line of a text file (the header of a CSV is line 1), the row of a Parquet file
    (from 1) or None; `entry` is the name of a zip's entry; `column` the column at fault.
    """

    line: int | None = None
    column: str | None = None
    entry: str | None = None
    reason: str

    def __str__(self) -> str:
        where = [
            text
            for text, given in (
                (f"line {self.line}", self.line),
                (f"entry {self.entry!r}", self.entry),
                (f"column {self.column!r}", self.column),
            )
            if given is not None
        ]
        return f"{', '.join(where)}: {self.reason}" if where else self.reason


class FileErrors(BaseModel, frozen=True):
    """Why an upload is unusable: the first errors, and how many there were in all."""

    errors: tuple[RowError, ...]
    total: int

    def summary(self) -> str:
        """Return one line a person can act on, for `status_details`."""
        shown = "; ".join(str(error) for error in self.errors[:20])
        more = self.total - min(20, len(self.errors))
        return f"{shown}; and {more} more" if more > 0 else shown


class ValueRange(BaseModel, frozen=True):
    """The values of a regression's rows; `deviation` is their standard deviation."""

    low: float
    high: float
    mean: float
    deviation: float


class DatasetManifest(BaseModel, frozen=True):
    """A processed data set; `sha256` is of the Parquet normal form.

    `counts` is how many rows have each label, of which a row has several in multi-label data; data
    of a regression has no labels, and `values` instead. `unreadable` images were left out: they are
    not among the rows.
    """

    format: Literal["graft-dataset-1"] = "graft-dataset-1"
    modality: Modality
    task: Task = Task.SINGLE_LABEL
    rows: int = Field(ge=1)
    counts: dict[str, int]
    values: ValueRange | None = None
    unreadable: tuple[RowError, ...] = ()
    sha256: str

    @property
    def classes(self) -> list[str]:
        """The labels, sorted: their order is the order of a head's outputs."""
        return sorted(self.counts)
