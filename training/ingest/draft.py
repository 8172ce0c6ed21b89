"""A data set in the making: rows go in, a manifest or all that is wrong comes out.

Not more rows and classes than allowed are taken; what rows need besides is for their kind of target
to say (training.ingest.targets).

Once there is an error nothing more is written, but reading goes on, to find the others. A few
images that cannot be decoded are no error (`UNREADABLE_SHARE`, and not more than can be listed):
among thousands of photographs there is often one, and an upload of gigabytes is not worth it. They
are left out, and the manifest names them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from io import BufferedReader
from typing import BinaryIO, cast

from core.datasets import DatasetManifest, FileErrors, Modality, RowError, Task
from training.ingest.findings import Findings
from training.ingest.limits import MAX_ERRORS_KEPT, UNREADABLE_SHARE, Limits
from training.ingest.normal_form import NormalFormWriter
from training.ingest.rows import (
    EncodedImage,
    Row,
    Unreadable,
    Unusable,
    check_image,
    check_text,
)
from training.ingest.targets import TALLIES, LabelTally, Tally, Target


class Draft:
    """Collects one upload's rows and writes its normal form to `sink`, a seekable file."""

    def __init__(self, sink: BinaryIO, limits: Limits) -> None:
        self._sink = sink
        self._limits = limits
        self._findings = Findings()
        self._writer: NormalFormWriter | None = None
        self._modality: Modality | None = None
        self._rows = 0
        self._task = Task.SINGLE_LABEL
        self._tally: Tally | None = None
        self._every_target_read = True
        self._unreadable: list[Row] = []
        self._unreadable_count = 0

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
            self._every_target_read = False
            self._findings.add(found)
            return True
        self._modality = found.modality
        item = self._take_item(found)
        if isinstance(item, Unreadable):
            self._unreadable_count += 1
            if self._unreadable_count <= MAX_ERRORS_KEPT:
                self._unreadable.append(replace(found, item=None))
            return True
        target = self._take_target(found)
        if self._tally is not None and len(self._tally.counts) > self._limits.max_classes:
            return self._stop(
                found.error(
                    found.target_column,
                    f"there are more than {self._limits.max_classes} different labels; "
                    "use the column that holds the class, not an id or a text",
                )
            )
        has_errors = self._findings.total > self._unreadable_count
        if item is not None and target is not None and not has_errors:
            if self._writer is None:
                self._writer = NormalFormWriter(self._sink, found.modality, found.task)
            self._writer.add(item, target)
        return True

    def finish(self) -> DatasetManifest | FileErrors:
        """Judge the data set as a whole; when it is good the normal form is complete."""
        rows, left_out = self._rows - self._unreadable_count, self._unreadable_count
        if left_out > min(MAX_ERRORS_KEPT, UNREADABLE_SHARE * self._rows):
            # They are errors like others, and their targets are to be judged with the others'.
            rows, left_out = self._rows, 0
            self._every_target_read &= self._unreadable_count == len(self._unreadable)
            for row in self._unreadable:
                self._take_target(row)
        tally = self._tally or LabelTally()
        if self._every_target_read:
            for problem in tally.problems(rows):
                self._findings.add(problem)
        errors = self._findings.result()
        if errors.total > left_out or self._writer is None or self._modality is None:
            return errors
        self._writer.close()
        self._writer = None
        self._sink.flush()
        self._sink.seek(0)
        return DatasetManifest(
            modality=self._modality,
            task=self._task,
            rows=rows,
            unreadable=errors.errors,
            counts=tally.counts,
            values=tally.values(),
            sha256=hashlib.file_digest(cast("BufferedReader", self._sink), "sha256").hexdigest(),
        )

    def close(self) -> None:
        """Give up the normal form unless it is complete."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None

    def _take_item(self, row: Row) -> str | EncodedImage | Unreadable | None:
        check = check_text if row.modality is Modality.TEXT else check_image
        item = check(row.item, self._limits)
        if isinstance(item, Unusable):
            self._findings.add(row.error(row.modality.value, item.reason))
            return item if isinstance(item, Unreadable) else None
        return item

    def _take_target(self, row: Row) -> Target | None:
        if self._tally is None:
            self._task, self._tally = row.task, TALLIES[row.task]()
        target = self._tally.take(row)
        if isinstance(target, Unusable):
            self._every_target_read = False
            self._findings.add(row.error(row.target_column, target.reason))
            return None
        return target

    def _stop(self, error: RowError) -> bool:
        # What follows was never read, so the targets cannot be judged.
        self._every_target_read = False
        self._findings.add(error)
        return False
