"""The entry point, the detection of formats, and the rules about a data set as a whole."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.datasets import DatasetManifest, FileErrors, FileStatus, Modality, UploadedFile
from core.errors import DataError, NoSpace, NotFound
from core.files import FileStore, sha256
from core.settings import Settings
from core.store import ArtifactStore
from tests.unit.ingest_builders import (
    GOOD_ROWS,
    LIMITS,
    ROOT,
    accepted,
    image_zip,
    jsonl,
    limits,
    parquet,
    parse,
    refused,
)
from training import ingest as package
from training.data import read_dataset
from training.ingest import Limits, ingest
from training.ingest.findings import Findings, shown

GOOD_CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in GOOD_ROWS)


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(ArtifactStore(str(tmp_path)), "default")


@pytest.fixture
def upload(files: FileStore, tmp_path: Path):
    def put(data: bytes, filename: str) -> str:
        ArtifactStore(str(tmp_path)).put_new(files.upload_key("file-1"), data)
        files.complete(UploadedFile(id="file-1", filename=filename, bytes=len(data), created_at=0))
        return "file-1"

    return put


def test_a_good_upload_is_processed(files: FileStore, upload) -> None:
    file_id = upload(GOOD_CSV.encode(), "train.csv")

    manifest = ingest(files, file_id, LIMITS)

    assert manifest == DatasetManifest(
        modality=Modality.TEXT,
        rows=4,
        counts={"greet": 2, "leave": 2},
        sha256=sha256(files.open_data(file_id).read()),
    )
    assert files.status(file_id) == (FileStatus.PROCESSED, manifest)
    table = pq.read_table(files.open_data(file_id))
    assert table.schema.equals(pa.schema([("text", pa.string()), ("label", pa.string())]))
    assert list(zip(*(c.to_pylist() for c in table.columns), strict=True)) == GOOD_ROWS


def test_a_data_set_that_was_damaged_is_not_trained_on(
    files: FileStore, upload, tmp_path: Path
) -> None:
    file_id = upload(GOOD_CSV.encode(), "train.csv")
    ingest(files, file_id, LIMITS)
    assert len(read_dataset(files, file_id, param="training_file").items) == 4
    (stored,) = tmp_path.rglob("data.parquet")
    table = pq.read_table(stored)
    pq.write_table(table.slice(1), stored)
    with pytest.raises(DataError, match="damaged"):
        read_dataset(files, file_id, param="training_file")


def test_a_bad_upload_is_in_error_with_everything_that_is_wrong(files: FileStore, upload) -> None:
    file_id = upload(b"text,label\n ,x\nb,\nc\n", "train.csv")

    outcome = ingest(files, file_id, LIMITS)

    assert isinstance(outcome, FileErrors)
    assert [(error.line, error.column) for error in outcome.errors] == [
        (2, "text"),
        (3, "label"),
        (4, None),
    ]
    assert outcome.total == 3
    assert files.status(file_id) == (FileStatus.ERROR, outcome)
    with pytest.raises(NotFound):
        files.open_data(file_id)


@pytest.mark.parametrize("data", [GOOD_CSV.encode(), b"text,label\n"])
def test_a_second_ingest_returns_what_is_known(files: FileStore, upload, data: bytes) -> None:
    file_id = upload(data, "train.csv")
    first = ingest(files, file_id, LIMITS)

    assert ingest(files, file_id, limits(max_rows=2)) == first


def test_a_missing_upload_is_not_found(files: FileStore) -> None:
    with pytest.raises(NotFound):
        ingest(files, "file-2", LIMITS)


@pytest.mark.parametrize(
    ("error", "raised"), [(MemoryError(), MemoryError), (OSError(28, "full"), NoSpace)]
)
def test_what_is_not_the_uploads_fault_passes(
    files: FileStore, upload, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type
) -> None:
    def parse(source: object, limits: object):
        yield from package.csv.parse(source, limits)
        raise error

    file_id = upload(GOOD_CSV.encode(), "train.csv")
    monkeypatch.setitem(package._PARSERS, package.Format.CSV, parse)

    with pytest.raises(raised):
        ingest(files, file_id, LIMITS)
    assert files.status(file_id) == (FileStatus.UPLOADED, None)
    # Frees the half-written normal form here; a writer left open would complain, and fail the test.
    error.__traceback__ = None
    gc.collect()


def test_limits_come_from_the_settings() -> None:
    settings = Settings(max_rows=7, max_zip_ratio=3)
    assert Limits.from_settings(settings).max_rows == 7
    assert Limits.from_settings(settings).max_zip_ratio == 3
    assert Limits.from_settings(settings).max_pixels == settings.max_pixels


def test_importing_ingest_imports_no_training_library() -> None:
    code = (
        "import sys, training.ingest; "
        "print({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"


def test_the_same_upload_gives_the_same_bytes_in_bounded_row_groups() -> None:
    rows = [{"text": f"text {i} " * 40, "label": i % 3} for i in range(9000)]
    outcome, normal_form = parse(jsonl(*rows), "a.jsonl")

    assert parse(jsonl(*rows), "a.jsonl") == (outcome, normal_form)
    metadata = pq.ParquetFile(io.BytesIO(normal_form)).metadata
    assert [metadata.row_group(i).num_rows for i in range(3)] == [4096, 4096, 808]
    assert isinstance(outcome, DatasetManifest)
    assert outcome.counts == {"0": 3000, "1": 3000, "2": 3000}


@pytest.mark.parametrize(
    ("data", "real"),
    [
        (parquet({"text": [t for t, _ in GOOD_ROWS], "label": [y for _, y in GOOD_ROWS]}), "text"),
        (jsonl(*({"text": t, "label": y} for t, y in GOOD_ROWS)), "text"),
        (image_zip(), "image"),
    ],
)
@pytest.mark.parametrize("filename", ["train.csv", "train", "train.json", "../../etc/passwd"])
def test_content_counts_for_more_than_the_name(data: bytes, real: str, filename: str) -> None:
    outcome, _ = parse(data, filename)
    assert isinstance(outcome, DatasetManifest)
    assert outcome.modality == real


@pytest.mark.parametrize(
    ("data", "filename", "error"),
    [
        (b"", "train.csv", "the file is empty; upload CSV (.csv), JSONL (.jsonl), Parquet"),
        (b"\xff\xd8\xff\xe0 JFIF", "cat.jpg", "none of the accepted formats; upload CSV (.csv)"),
        (b"text,label\na,b\n", "train.txt", "none of the accepted formats; upload CSV (.csv)"),
        (b"text,label\n", "train.zip", "named .zip but does not begin like one"),
        (b"text,label\n", "train.PARQUET", "named .parquet but does not begin like one"),
        (b"\x1f\x8b\x08", "train.csv.gz", "compressed with gzip; unpack it"),
        (GOOD_CSV.encode("utf-16"), "train.csv", "line 1: the file is not UTF-8 but UTF-16; save"),
        (GOOD_CSV.encode("utf-16-le"), "train.csv", "not UTF-8 but UTF-16; save the file as UTF-8"),
        (GOOD_CSV.replace("\n", "\r").encode(), "t.csv", "line 1: the lines end in carriage retur"),
    ],
)
def test_what_is_no_accepted_format_is_told_so(data: bytes, filename: str, error: str) -> None:
    [found] = refused(data, filename)
    assert error in found


def csv(*labels: str) -> bytes:
    return "\n".join(["text,label", *(f"t{i},{y}" for i, y in enumerate(labels))]).encode()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (csv(), "the file has no rows; at least 2 classes of 2 rows are needed"),
        (csv("a"), "the file has only 1 row; at least 2 classes of 2 rows are needed"),
        (csv("a", "a"), "all 2 rows have the label 'a'; add rows of at least one other class"),
        (
            csv("b", "a"),
            "2 classes have only one row: 'a', 'b'; add at least one row to each or remove it",
        ),
        (
            csv("b", "a", "a"),
            "1 class has only one row: 'b'; add at least one row to each or remove it",
        ),
    ],
)
def test_too_few_rows_or_classes(data: bytes, error: str) -> None:
    assert refused(data, "a.csv") == [error]


def test_classes_of_one_row_are_named_to_a_bound() -> None:
    [error] = refused(csv(*(f"c{i:03}" for i in range(50))), "a.csv")
    assert error.startswith("50 classes have only one row: 'c000', ")
    assert "'c009' and 40 more; " in error
    assert "c010" not in error


def test_too_many_rows_stop_the_reading() -> None:
    data = csv("a", "a", "b", "b", "b") + b'\n"never closed'
    assert refused(data, "a.csv", limits(max_rows=4)) == [
        "line 6: there are more than 4 rows; upload fewer of them"
    ]
    assert len(accepted(csv("a", "a", "b", "b"), "a.csv", limits(max_rows=4))) == 4


def test_lines_that_are_no_rows_count_towards_the_rows() -> None:
    outcome, _ = parse(b"text,label\n" + b"x\n" * 1000, "a.csv", limits(max_rows=500))
    assert isinstance(outcome, FileErrors)
    assert outcome.total == 501


def test_100_000_classes_are_one_error() -> None:
    data = csv(*(f"id{i}" for i in range(100_000)))
    assert refused(data, "a.csv") == [
        "line 1002, column 'label': there are more than 1000 different labels; "
        "use the column that holds the class, not an id or a text"
    ]


def test_classes_are_not_judged_when_a_label_could_not_be_read() -> None:
    assert refused(csv("a", "a", "b", ""), "a.csv") == [
        "line 5, column 'label': the label is blank; fill it in or remove the row"
    ]


def test_classes_are_judged_when_only_texts_are_wrong() -> None:
    assert refused(b"text,label\n,a\nx,a\ny,b\n", "a.csv") == [
        "line 2, column 'text': the text is blank; fill it in or remove the row",
        "1 class has only one row: 'b'; add at least one row to each or remove it",
    ]


def test_labels_that_differ_by_whitespace_are_the_same_and_texts_stay_as_they_are() -> None:
    rows = accepted(b"text,label\n a ,x\na, x\n a ,y\n a ,y \n", "a.csv")
    assert rows == [(" a ", "x"), ("a", "x"), (" a ", "y"), (" a ", "y")]


def test_an_accent_is_the_same_however_it_is_composed() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    data = f"text,label\n{decomposed},{composed}\nb,{decomposed}\nc,x\nd,x\n".encode()
    rows = accepted(data, "a.csv")
    assert rows[:2] == [(decomposed, composed), ("b", composed)]


def test_errors_beyond_a_hundred_are_counted_only() -> None:
    outcome, _ = parse(b"text,label\n" + b" ,x\n" * 1000, "a.csv")
    assert isinstance(outcome, FileErrors)
    assert [error.line for error in outcome.errors] == list(range(2, 102))
    assert outcome.total == 1001  # The last one: there is one class only.
    assert outcome.summary().endswith("and 981 more")


def test_findings_without_a_line_come_last() -> None:
    findings = Findings()
    for line in (None, 7, 3):
        findings.add(package.RowError(line=line, reason="r"))
    assert [error.line for error in findings.result().errors] == [3, 7, None]


def test_a_users_text_is_shortened_and_escaped_in_messages() -> None:
    assert shown("a\x1b[31m\nb") == r"'a\x1b[31m\nb'"
    [error] = refused(csv("a", "a", "\x07" + "z" * 100, "b", "b"), "a.csv")
    assert error == (
        "line 4, column 'label': the label '\\x07" + "z" * 39 + "…' contains a control character; "
        "remove it"
    )
