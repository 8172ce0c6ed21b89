"""The labelled sets that benches run on: read, drawn, and packed as uploads.

A set is named `<source>` or `<source>@<rows per class>`, such as `banking@10`; a draw of it belongs
to a seed. Test rows are never drawn from, and are the same for every seed.
"""

from __future__ import annotations

import csv
import io
import random
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.datasets import Modality

Row = tuple[Any, str]
EXAMPLES = Path(__file__).parent.parent / "examples"


@dataclass(frozen=True)
class Split:
    """Training and test rows: texts, or encoded images, and their labels."""

    modality: Modality
    train: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class DataSet:
    """A source, and how many rows of each class a draw takes; None is all."""

    source: str
    per_class: int | None

    @classmethod
    def parse(cls, name: str) -> DataSet:
        """Read `<source>` or `<source>@<rows per class>`; raise `ValueError`."""
        source, _, rows = name.partition("@")
        if source not in SOURCES:
            raise ValueError(f"{source} is none of {', '.join(SOURCES)}")
        return cls(source, int(rows) if rows else None)

    def __str__(self) -> str:
        return self.source if self.per_class is None else f"{self.source}@{self.per_class}"

    def draw(self, data: Path, seed: int, test_rows: int | None = None) -> Split:
        """Draw the training rows; of the test rows at most so many, the same for every seed."""
        whole = SOURCES[self.source](data)
        test = list(whole.test)
        random.Random(0).shuffle(test)
        train = whole.train
        if self.per_class is not None:
            train = few_shot(train, self.per_class, seed)
        return Split(whole.modality, train, test[:test_rows])


def few_shot(rows: list[Row], per_class: int, seed: int) -> list[Row]:
    """Draw `per_class` rows of each class, or all that a class has, without replacement."""
    by_class: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_class[row[1]].append(row)
    numbers = random.Random(seed)
    return [
        row
        for label in sorted(by_class)
        for row in numbers.sample(by_class[label], min(per_class, len(by_class[label])))
    ]


# -- sources -----------------------------------------------------------------------------------


def read_csv(path: Path, label: str) -> list[Row]:
    """Rows of a CSV file with a column `text`."""
    with path.open(newline="", encoding="utf-8") as lines:
        return [(row["text"], row[label]) for row in csv.DictReader(lines)]


def read_banking(path: Path) -> list[Row]:
    """Rows of one Banking77 file."""
    return read_csv(path, "category")


def banking(data: Path) -> Split:
    """Banking77: 77 intents of a bank's customers (Casanueva et al. 2020)."""
    folder = data / "banking77"
    return Split(
        Modality.TEXT, read_banking(folder / "train.csv"), read_banking(folder / "test.csv")
    )


def topics(data: Path) -> Split:
    """Banking77 by the first word of the intent: 45 coarse classes of uneven breadth."""
    whole = banking(data)
    train, test = (
        [(text, label.split("_")[0].lower()) for text, label in rows]
        for rows in (whole.train, whole.test)
    )
    return Split(Modality.TEXT, train, test)


def pair(data: Path) -> Split:
    """Two of the topics that are easily confused: something is pending, or it is a transfer."""
    whole = topics(data)
    train, test = (
        [row for row in rows if row[1] in ("pending", "transfer")]
        for rows in (whole.train, whole.test)
    )
    return Split(Modality.TEXT, train, test)


def support(data: Path) -> Split:
    """The project's own ten intents; the test rows are in another voice, and hard."""
    del data
    folder = EXAMPLES / "support-intents"
    train, test = (read_csv(folder / name, "label") for name in ("train.csv", "heldout.csv"))
    return Split(Modality.TEXT, train, test)


def clothing(data: Path) -> Split:
    """Photographs of ten kinds of clothes."""
    train, test = (
        [(path.read_bytes(), path.parent.name) for path in sorted(folder.glob("*/*.jpg"))]
        for folder in (data / "clothing" / "train", data / "clothing" / "test")
    )
    return Split(Modality.IMAGE, train, test)


def digits(data: Path) -> Split:
    """scikit-learn's handwritten digits, 8 × 8 pixels, as PNGs: far from any photograph."""
    del data
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    rows: list[Row] = []
    for pixels, label in zip(found.images, found.target, strict=True):
        buffer = io.BytesIO()
        Image.fromarray((pixels * 15.9).astype(np.uint8)).convert("RGB").save(buffer, "PNG")
        rows.append((buffer.getvalue(), str(label)))
    return Split(Modality.IMAGE, rows[::2], rows[1::2][:500])


SOURCES: dict[str, Callable[[Path], Split]] = {
    "banking": banking,
    "topics": topics,
    "pair": pair,
    "support": support,
    "clothing": clothing,
    "digits": digits,
}


# -- uploads -----------------------------------------------------------------------------------


def as_upload(modality: Modality, rows: Sequence[Row]) -> tuple[str, bytes]:
    """The rows as a file name and its bytes; images get the suffix that their bytes call for."""
    if modality is Modality.TEXT:
        return "rows.csv", as_csv(rows)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for number, (image, label) in enumerate(rows):
            suffix = "png" if image.startswith(b"\x89PNG") else "jpg"
            archive.writestr(f"{label}/{number:06}.{suffix}", image)
    return "rows.zip", data.getvalue()


def as_csv(rows: Sequence[Row]) -> bytes:
    """Rows of texts as an upload."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("text", "label"), *rows])
    return text.getvalue().encode()
