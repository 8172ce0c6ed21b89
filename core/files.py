"""Uploaded files in the artifact store, and what has become of them.

    <tenant>/files/<id>/upload          the bytes as they came
    <tenant>/files/<id>/upload.json     UploadedFile, written when the last byte is stored
    <tenant>/files/<id>/data.parquet    the normal form
    <tenant>/files/<id>/manifest.json   DatasetManifest: the file is `processed`
    <tenant>/files/<id>/error.json      FileErrors: the file is in `error`

A file's status is which of the last two exists, so it does not depend on Redis. Not here: parsing
(training.ingest), and refusing to delete a file in use (service.api.files).
"""

from __future__ import annotations

import hashlib
import mmap
from contextlib import suppress
from io import BufferedReader
from typing import IO, cast

from core.datasets import DatasetManifest, FileErrors, FileStatus, RowError, UploadedFile
from core.errors import AlreadyExists, NotFound
from core.store import ArtifactStore


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class FileStore:
    """One tenant's uploaded files."""

    def __init__(self, store: ArtifactStore, tenant: str) -> None:
        self._store = store
        self._root = f"{tenant}/files"

    def upload_key(self, file_id: str) -> str:
        """The key under which the service streams an upload's bytes."""
        return f"{self._root}/{file_id}/upload"

    def complete(self, file: UploadedFile) -> None:
        """Record that all of a file's bytes are stored; from now on it is `uploaded`."""
        self._store.put_new(f"{self._root}/{file.id}/upload.json", file.model_dump_json().encode())

    def get(self, file_id: str) -> UploadedFile:
        """Return the file; raise `NotFound`."""
        try:
            return UploadedFile.model_validate_json(
                self._store.get(f"{self._root}/{file_id}/upload.json")
            )
        except NotFound:
            raise NotFound(f"no file {file_id}", param="file_id") from None

    def status(self, file_id: str) -> tuple[FileStatus, DatasetManifest | FileErrors | None]:
        """Return the status with the manifest of a processed file or the errors of a bad one."""
        manifest = self._read(file_id, "manifest.json")
        if manifest is not None:
            return FileStatus.PROCESSED, DatasetManifest.model_validate_json(manifest)
        errors = self._read(file_id, "error.json")
        if errors is not None:
            return FileStatus.ERROR, FileErrors.model_validate_json(errors)
        return FileStatus.UPLOADED, None

    def open_upload(self, file_id: str) -> IO[bytes]:
        """Open the bytes as they were uploaded; raise `NotFound`."""
        return self._store.open(self.upload_key(file_id))

    def open_data(self, file_id: str) -> IO[bytes]:
        """Open the Parquet normal form; raise `NotFound`."""
        return self._store.open(f"{self._root}/{file_id}/data.parquet")

    def is_intact(self, file_id: str, manifest: DatasetManifest) -> bool:
        """Tell whether the normal form is that which the manifest is of; raise `NotFound`."""
        return self._digest(file_id) == manifest.sha256

    def accept(
        self, file_id: str, parquet: bytes | mmap.mmap, manifest: DatasetManifest
    ) -> DatasetManifest:
        """Store the normal form, manifest last, and return the manifest; harmless to do again."""
        try:
            self._store.put_new(f"{self._root}/{file_id}/data.parquet", parquet)
        except AlreadyExists:
            # Of an attempt before this one: the same rows, for parsing is deterministic, but not
            # the same bytes if another release of Arrow wrote them.
            manifest = manifest.model_copy(update={"sha256": self._digest(file_id)})
        self._put(file_id, "manifest.json", manifest.model_dump_json().encode())
        return manifest

    def refuse(self, file_id: str, errors: FileErrors) -> None:
        """Store why the file is unusable."""
        self._put(file_id, "error.json", errors.model_dump_json().encode())

    def give_up(self, file_id: str, reason: str) -> None:
        """Store that the file could not be parsed, unless it has been, or is gone."""
        if self.status(file_id)[0] is FileStatus.UPLOADED:
            with suppress(NotFound):
                self.get(file_id)
                self.refuse(file_id, FileErrors(errors=(RowError(reason=reason),), total=1))

    def ids(self) -> list[str]:
        """Return the ids of all files, complete or not, sorted."""
        return self._store.children(self._root)

    def delete(self, file_id: str) -> None:
        """Delete all of a file; `upload.json` goes first, so that no half of it is ever listed."""
        self.get(file_id)
        self.discard(file_id)

    def discard(self, file_id: str) -> None:
        """Delete whatever there is of a file, complete or not."""
        names = ("upload.json", "manifest.json", "error.json", "data.parquet", "upload")
        self._store.delete(*(f"{self._root}/{file_id}/{name}" for name in names))

    def _digest(self, file_id: str) -> str:
        with self.open_data(file_id) as stored:
            return hashlib.file_digest(cast("BufferedReader", stored), "sha256").hexdigest()

    def _read(self, file_id: str, name: str) -> bytes | None:
        try:
            return self._store.get(f"{self._root}/{file_id}/{name}")
        except NotFound:
            return None

    def _put(self, file_id: str, name: str, data: bytes) -> None:
        # If it exists, another attempt of the same ingest wrote it; parsing is deterministic.
        with suppress(AlreadyExists):
            self._store.put_new(f"{self._root}/{file_id}/{name}", data)
