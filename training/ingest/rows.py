"""One row of an upload, and what makes its text, image or label acceptable.

A parser yields a `Row` with the values as it found them, whatever their type, or a `RowError` where
there is no row to speak of. The checks return the value in its final form or `Unusable` with the
reason and the remedy, so that a row with two faults is reported with both.

Not here: rules about many rows (training.ingest.draft).
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from core.datasets import TARGET_COLUMNS, Modality, RowError, Task
from core.errors import InvalidRequest, PayloadTooLarge
from core.preprocessing import decode_image
from training.ingest.findings import shown
from training.ingest.limits import MAX_IMAGE_BYTES, MAX_LABEL_CHARS, MAX_PATH_CHARS, Limits


@dataclass(frozen=True)
class Unusable:
    """A value that cannot be used. `reason` says why and what to do."""

    reason: str


@dataclass(frozen=True)
class Unreadable(Unusable):
    """An image that cannot be decoded: damaged, cut short, or no image at all."""


@dataclass(frozen=True)
class EncodedImage:
    """An image file's bytes, and the name it had where it came from."""

    data: bytes
    path: str | None


@dataclass(frozen=True)
class Row:
    """A row as a parser found it, at a `line` (or Parquet row) or in a zip's `entry`.

    `target` is what stands in the task's column.
    """

    modality: Modality
    item: object
    target: object
    task: Task = Task.SINGLE_LABEL
    line: int | None = None
    entry: str | None = None

    @property
    def place(self) -> str:
        """Where the row is, in words."""
        return f"line {self.line}" if self.entry is None else f"entry {shown(self.entry)}"

    @property
    def target_column(self) -> str:
        """The column that the target is from."""
        return TARGET_COLUMNS[self.task]

    def error(self, column: str, reason: str) -> RowError:
        """Return an error at this row; a zip's entry has no columns."""
        return RowError(
            line=self.line,
            column=column if self.entry is None else None,
            entry=self.entry,
            reason=reason,
        )


Parser = Callable[[BinaryIO, Limits], Iterator[Row | RowError]]


def check_text(value: object, limits: Limits) -> str | Unusable:
    """Return the text unchanged, or why it cannot be used."""
    if isinstance(value, Unusable):
        return value
    if value is None:
        return Unusable("the text is null; fill it in or remove the row")
    if not isinstance(value, str):
        return Unusable(f"the text must be a string, not {kind(value)}; put it in double quotes")
    if not value.strip():
        return Unusable("the text is blank; fill it in or remove the row")
    if len(value) > limits.max_text_chars:
        return Unusable(
            f"the text is {len(value)} characters long; shorten it to {limits.max_text_chars}"
        )
    if "\0" in value:
        return Unusable("the text contains a NUL byte; remove it")
    if _has_surrogate(value):
        return Unusable("the text contains half of a surrogate pair; write the character whole")
    return value


def check_label(value: object) -> str | Unusable:
    """Return the label stripped and in Unicode's NFC, an integer in decimal, or why not.

    A Mac's archives decompose the accents of folder names, and the same class must stay one.
    """
    if isinstance(value, Unusable):
        return value
    if value is None:
        return Unusable("the label is null; fill it in or remove the row")
    if type(value) is int:
        value = str(value)
    if not isinstance(value, str):
        return Unusable(f"the label must be a string or an integer, not {kind(value)}")
    label = unicodedata.normalize("NFC", value.strip())
    if not label:
        return Unusable("the label is blank; fill it in or remove the row")
    if len(label) > MAX_LABEL_CHARS:
        return Unusable(
            f"the label {shown(label)} is {len(label)} characters long; "
            f"shorten it to {MAX_LABEL_CHARS}"
        )
    if any(unicodedata.category(char) == "Cc" for char in label):
        return Unusable(f"the label {shown(label)} contains a control character; remove it")
    if _has_surrogate(label):
        return Unusable("the label contains half of a surrogate pair; write the character whole")
    return label


def check_image(value: object, limits: Limits) -> EncodedImage | Unusable:
    """Decode the image whole, as training will; return it unchanged, or why it cannot be used."""
    if isinstance(value, Unusable):
        return value
    if not isinstance(value, EncodedImage):
        return Unusable("there is no image; add its bytes or remove the row")
    if value.path is not None and len(value.path) > MAX_PATH_CHARS:
        return Unusable(
            f"the path of the image is longer than {MAX_PATH_CHARS} characters; shorten it"
        )
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged metadata, which training never looks at.
            warnings.simplefilter("ignore")
            decode_image(value.data, limits.max_pixels)
    except PayloadTooLarge as error:
        return Unusable(f"{error.message}; scale it down")
    except InvalidRequest as error:
        return Unreadable(f"{error.message}; save it again as JPEG, PNG or WEBP, or remove it")
    return value


def too_many_image_bytes(size: int) -> str:
    """Return the reason for an image file of `size` bytes that is too large."""
    return f"the image file is {size} bytes; at most {MAX_IMAGE_BYTES} are allowed: scale it down"


def kind(value: object) -> str:
    """Name the type of a JSON value."""
    names = {
        bool: "true or false", int: "an integer", float: "a number with a fraction",
        str: "a string", list: "a list", dict: "an object",
    }  # fmt: skip
    return "null" if value is None else names.get(type(value), "this type")


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)
