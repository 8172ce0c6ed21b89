"""Uploaded files: a status that is told by what is in the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.datasets import (
    DatasetManifest,
    FileErrors,
    FileStatus,
    Modality,
    RowError,
    UploadedFile,
)
from core.errors import AlreadyExists, NotFound
from core.files import FileStore
from core.store import ArtifactStore

FILE = UploadedFile(id="file-1", filename="a.csv", bytes=3, created_at=1.0)
MANIFEST = DatasetManifest(modality=Modality.TEXT, rows=2, counts={"b": 1, "a": 1}, sha256="0")
ERRORS = FileErrors(errors=(RowError(line=2, column="label", reason="is empty"),), total=4)


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(ArtifactStore(str(tmp_path)), "default")


def upload(files: FileStore) -> None:
    files._store.put_new(files.upload_key(FILE.id), b"abc")
    files.complete(FILE)


def test_a_file_is_there_once_its_last_byte_is(files: FileStore):
    files._store.put_new(files.upload_key(FILE.id), b"abc")
    with pytest.raises(NotFound):
        files.get(FILE.id)
    files.complete(FILE)
    assert files.get(FILE.id) == FILE
    assert files.status(FILE.id) == (FileStatus.UPLOADED, None)
    assert files.open_upload(FILE.id).read() == b"abc"
    with pytest.raises(AlreadyExists):
        files.complete(FILE)


def test_a_parsed_file_is_processed(files: FileStore):
    upload(files)
    files.accept(FILE.id, b"parquet", MANIFEST)
    files.accept(FILE.id, b"parquet", MANIFEST)
    assert files.status(FILE.id) == (FileStatus.PROCESSED, MANIFEST)
    assert files.open_data(FILE.id).read() == b"parquet"
    assert MANIFEST.classes == ["a", "b"]


def test_what_an_attempt_before_has_stored_counts(files: FileStore):
    upload(files)
    files._store.put_new(f"default/files/{FILE.id}/data.parquet", b"of another release")
    accepted = files.accept(FILE.id, b"parquet", MANIFEST)
    assert files.status(FILE.id) == (FileStatus.PROCESSED, accepted)
    assert files.is_intact(FILE.id, accepted)
    assert not files.is_intact(FILE.id, MANIFEST)


def test_a_bad_file_is_in_error(files: FileStore):
    upload(files)
    files.refuse(FILE.id, ERRORS)
    assert files.status(FILE.id) == (FileStatus.ERROR, ERRORS)
    assert ERRORS.summary() == "line 2, column 'label': is empty; and 3 more"


def test_half_a_normal_form_is_not_processed(files: FileStore):
    upload(files)
    files._store.put_new(f"default/files/{FILE.id}/data.parquet", b"parquet")
    assert files.status(FILE.id)[0] is FileStatus.UPLOADED


def test_delete_takes_everything(files: FileStore, tmp_path: Path):
    upload(files)
    files.accept(FILE.id, b"parquet", MANIFEST)
    files.delete(FILE.id)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(NotFound):
        files.delete(FILE.id)


def test_another_tenant_does_not_see_it(files: FileStore, tmp_path: Path):
    upload(files)
    other = FileStore(ArtifactStore(str(tmp_path)), "other")
    assert other.ids() == []
    with pytest.raises(NotFound):
        other.get(FILE.id)
    assert files.ids() == [FILE.id]
