"""The columns of a Parquet upload, their types, and Hugging Face class names."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.ingest_builders import (
    GOOD_ROWS,
    accepted,
    image,
    parquet,
    refused,
)

TEXTS = [text for text, _ in GOOD_ROWS]
LABELS = [label for _, label in GOOD_ROWS]
IMAGES = [image(seed=i) for i in range(4)]
STRUCTS = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(IMAGES)]


def class_label(*names: object) -> dict[str, str]:
    feature = {"names": names, "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
def test_every_kind_of_string(kind: pa.DataType) -> None:
    columns = {"id": [1, 2, 3, 4], "label": pa.array(LABELS).cast(kind), "text": pa.array(TEXTS)}
    columns["text"] = columns["text"].cast(kind)
    assert accepted(parquet(columns), "a.parquet") == GOOD_ROWS


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint64()], ids=str)
def test_integer_labels(kind: pa.DataType) -> None:
    data = parquet({"text": TEXTS, "label": pa.array([7, 7, 10, 10], kind)})
    assert [label for _, label in accepted(data, "a.parquet")] == ["7", "7", "10", "10"]


def test_integer_labels_in_a_dictionary() -> None:
    data = parquet({"text": TEXTS, "label": pa.array([7, 7, 10, 10]).dictionary_encode()})
    assert [label for _, label in accepted(data, "a.parquet")] == ["7", "7", "10", "10"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"huggingface": "{"},
        {"huggingface": "[" * 100_000},
        {"huggingface": "[]"},
        class_label(1, 2),
        {"other": ""},
    ],
)
def test_metadata_that_makes_no_sense_leaves_integers(metadata: dict[str, str]) -> None:
    data = parquet({"text": TEXTS, "label": [0, 0, 1, 1]}, metadata=metadata)
    assert [label for _, label in accepted(data, "a.parquet")] == ["0", "0", "1", "1"]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_class_without_a_name(index: int) -> None:
    data = parquet({"text": TEXTS, "label": [0, 1, index, 0]}, metadata=class_label("a", "b"))
    assert refused(data, "a.parquet") == [
        f"line 3, column 'label': the label {index} has no name among the 2 of the ClassLabel; "
        "correct it or remove the row"
    ]


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        (
            {"text": TEXTS, "intent": LABELS},
            "column 'label': there is no column 'label', only 'text', 'intent'; "
            "rename column 'intent' to 'label'",
        ),
        (
            {"sentence": TEXTS, "label": LABELS},
            "column 'text': there is no column 'text', only 'sentence', 'label'; "
            "rename column 'sentence' to 'text'",
        ),
        (
            {"text": TEXTS, "image": STRUCTS, "label": LABELS},
            "column 'image': there are both a 'text' and an 'image' column; remove one of them",
        ),
        (
            {"text": TEXTS, "label": [1.0, 1.0, 2.0, 2.0]},
            "column 'label': the type is 'double' but must be string or integer; "
            "cast the column, or write the class's name",
        ),
        (
            {"text": TEXTS, "label": [True, True, False, False]},
            "column 'label': the type is 'bool' but must be string or integer; "
            "cast the column, or write the class's name",
        ),
        (
            {"text": TEXTS, "label": [["a"]] * 4},
            "column 'label': the type is 'list<element: string>' but must be string or integer; "
            "cast the column, or write the class's name",
        ),
        (
            {"text": [1, 2, 3, 4], "label": LABELS},
            "column 'text': the type is 'int64' but must be string; cast the column",
        ),
        (
            {"image": IMAGES, "label": LABELS},
            "column 'image': the type is 'binary' but must be a struct of 'bytes' (binary) and "
            "'path' (string), as Hugging Face datasets write images",
        ),
        (
            {"image": [{"bytes": "a", "path": "b"}] * 4, "label": LABELS},
            "column 'image': the type is 'struct<bytes: string, path: string>' but must be "
            "a struct of 'bytes' (binary) and 'path' (string), "
            "as Hugging Face datasets write images",
        ),
    ],
)
def test_columns_that_will_not_do(columns: dict[str, object], error: str) -> None:
    assert refused(parquet(columns), "a.parquet") == [error]


def test_two_columns_of_one_name() -> None:
    table = pa.Table.from_arrays(
        [pa.array(TEXTS), *[pa.array(LABELS)] * 2], ["text", *["label"] * 2]
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    assert refused(buffer.getvalue(), "a.parquet") == [
        "column 'label': there are 2 columns 'label'; remove all but one"
    ]
