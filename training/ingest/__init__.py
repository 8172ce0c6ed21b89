"""Uploads to data sets: from a stranger's bytes to the normal form, or to all that is wrong.

`ingest` is the way in. It copies the upload to scratch (parsers seek, and in an object store each
seek is a request), asks `formats` what it is, lets that format's `parse` yield rows and errors,
and collects them in a `draft`, which writes the normal form and judges the data set as a whole.
Memory is bounded whatever the upload holds, and the outcome depends on nothing but the upload and
the limits, so that doing it again is harmless.

`MemoryError` always passes: this runs in a child process with limits on memory and time, and who
set them turns that, or a kill, into a failure of the job (training.worker). Not here either: how
good the data is (training.report). Nothing in this package imports torch.
"""

from __future__ import annotations

import errno
import mmap
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from tempfile import TemporaryFile
from typing import BinaryIO

from core.datasets import DatasetManifest, FileErrors, RowError
from core.errors import NoSpace
from core.files import FileStore
from training.ingest import csv, images, jsonl, parquet
from training.ingest.draft import Draft
from training.ingest.formats import HEAD_BYTES, Format, detect
from training.ingest.limits import MIB, Limits
from training.ingest.rows import Parser

__all__ = ["Limits", "ingest", "parse_upload"]

_PARSERS: dict[Format, Parser] = {
    Format.CSV: csv.parse,
    Format.JSONL: jsonl.parse,
    Format.PARQUET: parquet.parse,
    Format.IMAGES: images.parse,
}


def ingest(files: FileStore, file_id: str, limits: Limits) -> DatasetManifest | FileErrors:
    """Parse an uploaded file and store the outcome, which is returned; a second time only that.

    Raises `NotFound` if there is no such upload, what the store raises, `NoSpace` for the scratch
    disk too, and `MemoryError`; never anything for what the upload holds.
    """
    _, known = files.status(file_id)
    if known is not None:
        return known
    filename = files.get(file_id).filename
    with _scratch_errors(), TemporaryFile() as upload, TemporaryFile() as normal_form:
        with files.open_upload(file_id) as stored:
            shutil.copyfileobj(stored, upload, MIB)
        outcome = parse_upload(upload, filename, limits, normal_form)
        if isinstance(outcome, FileErrors):
            files.refuse(file_id, outcome)
        else:
            # A data set may be as large as an upload, which memory need not be.
            mapped = mmap.mmap(normal_form.fileno(), 0, access=mmap.ACCESS_READ)
            outcome = files.accept(file_id, mapped, outcome)
    return outcome


def parse_upload(
    upload: BinaryIO, filename: str, limits: Limits, sink: BinaryIO
) -> DatasetManifest | FileErrors:
    """Parse `upload`, a seekable file, and write its normal form to `sink`, another.

    `sink` is of no use if errors are returned.
    """
    upload.seek(0)
    detected = detect(upload.read(HEAD_BYTES), filename)
    if isinstance(detected, RowError):
        return FileErrors(errors=(detected,), total=1)
    with closing(Draft(sink, limits)) as draft:
        for found in _PARSERS[detected](upload, limits):
            if not draft.add(found):
                break
        return draft.finish()


@contextmanager
def _scratch_errors() -> Iterator[None]:
    """Turn a full scratch disk into `NoSpace`; the store does so for itself."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("the scratch disk has no room left") from error
        raise
