"""A data set in the making: rows go in, a manifest or all that is wrong comes out.

Rules about many rows live here: at least two rows, two classes and two rows of each class, not more
rows and classes than allowed, labels of one type. They are judged only if every label was read:
otherwise a class may look short of rows because of an error that is reported already.

Once there is an error nothing more is written, but reading goes on, to find the others.
"""

from __future__ import annotations

import hashlib
from io import BufferedReader
from typing import BinaryIO, cast

from core.datasets import DatasetManifest, FileErrors, Modality, RowError
from training.ingest.findings import Findings, shown, shown_names
from training.ingest.limits import Limits
from training.ingest.normal_form import NormalFormWriter
from training.ingest.rows import EncodedImage, Row, Unusable, check_image, check_label, check_text


class Draft:
    """Collects one upload's rows and writes its normal form to `sink`, a seekable file."""

    def __init__(self, sink: BinaryIO, limits: Limits) -> None:
        self._sink = sink
        self._limits = limits
        self._findings = Findings()
        self._writer: NormalFormWriter | None = None
        self._modality: Modality | None = None
        self._rows = 0
        self._counts: dict[str, int] = {}
        self._every_label_read = True
        self._first_of_type: dict[bool, str] = {}

    def add(self, found: Row | RowError) -> bool:
        """Take what a parser found; False means that reading further is of no use."""
        self._rows += 1
        if self._rows > self._limits.max_rows:
            return self._stop(
                RowError(
                    line=found.line,
                    entry=found.entry,
                    reason=f"there are more than {self._limits.max_rows} rows; "
                    "upload fewer of them",
                )
            )
        if isinstance(found, RowError):
            self._every_label_read = False
            self._findings.add(found)
            return True
        self._modality = found.modality
        item = self._take_item(found)
        label = self._take_label(found)
        if len(self._counts) > self._limits.max_classes:
            return self._stop(
                found.error(
                    "label",
                    f"there are more than {self._limits.max_classes} different labels; "
                    "use the column that holds the class, not an id or a text",
                )
            )
        if item is not None and label is not None and not self._findings.total:
            if self._writer is None:
                self._writer = NormalFormWriter(self._sink, found.modality)
            self._writer.add(item, label)
        return True

    def finish(self) -> DatasetManifest | FileErrors:
        """Judge the data set as a whole; when it is good the normal form is complete."""
        if self._every_label_read:
            self._judge_classes()
        if self._findings.total or self._writer is None or self._modality is None:
            return self._findings.result()
        self._writer.close()
        self._writer = None
        self._sink.flush()
        self._sink.seek(0)
        return DatasetManifest(
            modality=self._modality,
            rows=self._rows,
            counts=self._counts,
            sha256=hashlib.file_digest(cast("BufferedReader", self._sink), "sha256").hexdigest(),
        )

    def close(self) -> None:
        """Give up the normal form unless it is complete."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None

    def _take_item(self, row: Row) -> str | EncodedImage | None:
        check = check_text if row.modality is Modality.TEXT else check_image
        item = check(row.item, self._limits)
        if isinstance(item, Unusable):
            self._findings.add(row.error(row.modality.value, item.reason))
            return None
        return item

    def _take_label(self, row: Row) -> str | None:
        label = check_label(row.label)
        if isinstance(label, Unusable):
            self._every_label_read = False
            self._findings.add(row.error("label", label.reason))
            return None
        is_integer = isinstance(row.label, int)
        if is_integer not in self._first_of_type:
            self._first_of_type[is_integer] = row.place
            if len(self._first_of_type) == 2:
                self._every_label_read = False
                self._findings.add(row.error("label", self._mixed_types(row, label)))
        self._counts[label] = self._counts.get(label, 0) + 1
        return label

    def _mixed_types(self, row: Row, label: str) -> str:
        here, there = ("a string", "an integer")
        if isinstance(row.label, int):
            here, there = there, here
        other = self._first_of_type[not isinstance(row.label, int)]
        return (
            f"the label {shown(label)} is {here} at {row.place} but {there} at {other}; "
            "use one type in the whole file, for example all strings"
        )

    def _judge_classes(self) -> None:
        if self._rows < 2:
            found = "no rows" if self._rows == 0 else "only 1 row"
            self._findings.add(
                RowError(reason=f"the file has {found}; at least 2 classes of 2 rows are needed")
            )
        elif len(self._counts) == 1:
            only = shown(next(iter(self._counts)))
            self._findings.add(
                RowError(
                    reason=f"all {self._rows} rows have the label {only}; "
                    "add rows of at least one other class"
                )
            )
        elif singles := sorted(label for label, count in self._counts.items() if count < 2):
            classes = "class has" if len(singles) == 1 else "classes have"
            self._findings.add(
                RowError(
                    reason=f"{len(singles)} {classes} only one row: {shown_names(singles)}; "
                    "add at least one row to each or remove it"
                )
            )

    def _stop(self, error: RowError) -> bool:
        # What follows was never read, so the classes cannot be judged.
        self._every_label_read = False
        self._findings.add(error)
        return False
