"""Uploads with several labels or a value for each row."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from core.datasets import DatasetManifest, Task
from tests.unit.ingest_builders import accepted, jsonl, parquet, parse, refused

LABELLED = [
    ("wet and cold", ["cold", "wet"]), ("wet", ["wet"]), ("cold", ["cold"]), ("dry", []),
]  # fmt: skip
VALUED = [(f"text {n}", n / 4) for n in range(12)]


def manifest(data: bytes, name: str) -> DatasetManifest:
    outcome, _ = parse(data, name)
    assert isinstance(outcome, DatasetManifest), outcome
    return outcome


def test_several_labels_in_every_format() -> None:
    lines = [{"text": text, "labels": labels[::-1]} for text, labels in LABELLED]
    table = "text,labels\n" + "".join(f"{text},{'|'.join(ls)}\n" for text, ls in LABELLED)
    columns: dict[str, object] = {
        "text": [text for text, _ in LABELLED], "labels": [labels for _, labels in LABELLED],
    }  # fmt: skip
    for data, name in ((jsonl(*lines), "a.jsonl"), (table.encode(), "a.csv"),
                       (parquet(columns), "a.parquet")):  # fmt: skip
        assert accepted(data, name) == LABELLED, name
        found = manifest(data, name)
        assert (found.task, found.counts, found.values) == (
            Task.MULTI_LABEL, {"cold": 2, "wet": 2}, None,
        )  # fmt: skip


def test_values_in_every_format() -> None:
    table = "value;text\n" + "".join(f"{value:+.2e};{text}\n" for text, value in VALUED)
    columns: dict[str, object] = {
        "text": [text for text, _ in VALUED],
        "value": pa.array([value for _, value in VALUED], pa.float32()),
    }
    lines = [{"text": text, "value": value} for text, value in VALUED]
    for data, name in ((jsonl(*lines), "a.jsonl"), (table.encode(), "a.csv"),
                       (parquet(columns), "a.parquet")):  # fmt: skip
        assert accepted(data, name) == VALUED, name
        found = manifest(data, name)
        assert (found.task, found.counts) == (Task.REGRESSION, {})
        assert found.values is not None
        assert (found.values.low, found.values.high, found.values.mean) == (0, 2.75, 1.375)
        assert found.values.deviation == pytest.approx(0.8630131)


def test_class_labels_in_lists_have_their_names() -> None:
    feature = {"names": ["cold", "wet"], "_type": "ClassLabel"}
    for described in ([feature], {"feature": feature, "_type": "List"}):
        metadata = {"huggingface": json.dumps({"info": {"features": {"labels": described}}})}
        columns: dict[str, object] = {
            "text": list("abcd"), "labels": [[0, 1], [1], [0], []],
        }  # fmt: skip
        rows = accepted(parquet(columns, metadata=metadata), "a.parquet")
        assert [labels for _, labels in rows] == [["cold", "wet"], ["wet"], ["cold"], []]


def test_a_label_column_decides_whatever_else_is_there() -> None:
    data = b"text,label,value,labels\na,x,1,p\nb,x,2,q\nc,y,3,\nd,y,4,p\n"
    assert manifest(data, "a.csv").task is Task.SINGLE_LABEL


REST = '{"text": "c", "labels": ["x"]}\n{"text": "d", "labels": []}\n'
NUMBERS = "".join(f"t,{n}\n" for n in range(10))


@pytest.mark.parametrize(
    ("data", "name", "error"),
    [
        (
            '{"text": "a", "labels": "x"}\n' + REST, "a.jsonl",
            "line 1, column 'labels': the labels must be a list of strings, not a string",
        ),
        (
            '{"text": "a", "labels": ["x", " x"]}\n' + REST, "a.jsonl",
            "line 1, column 'labels': the label 'x' is there twice; remove one",
        ),
        (
            REST + '{"text": "a", "labels": null}\n', "a.jsonl",
            "line 3, column 'labels': the labels are null; write an empty list if the row has none",
        ),
        (
            REST + '{"text": "a", "label": "x"}\n', "a.jsonl",
            "line 3, column 'labels': there is no key 'labels', only 'text', 'label'; "
            "name the key that holds the labels 'labels'",
        ),
        (
            "text,labels\na,x|\nb,x\nc,\n", "a.csv",
            "line 2, column 'labels': the label is blank; fill it in or remove the row",
        ),
        (
            "text,labels\na,x\nb,x\nc,\nd,y\n", "a.csv",
            "1 class has only one row: 'y'; add at least one row to each or remove it",
        ),
        (
            "text,labels\na,x\nb,x\nc,x\nd,\n", "a.csv",
            "fewer than two rows are without 'x'; add rows that do not have it, or remove the "
            "label",
        ),
        (
            "text,labels\na,\nb,\nc,\nd,\n", "a.csv",
            "none of the 4 rows has a label; add rows that have",
        ),
        (
            "text,labels,value\na,x,1\n", "a.csv",
            "line 1, column 'value': there are both 'labels' and 'value'; remove the one that is "
            "not to be predicted",
        ),
        (
            f'text,value\na,"1,5"\n{NUMBERS}', "a.csv",
            "line 2, column 'value': the value '1,5' is not a number such as 3.5; write it with a "
            "point",
        ),
        (
            f"text,value\na,nan\n{NUMBERS}", "a.csv",
            "line 2, column 'value': the value 'nan' is not a number such as 3.5; write it with a "
            "point",
        ),
        (
            f"text,value\na,1e99\n{NUMBERS}", "a.csv",
            "line 2, column 'value': the value must be a number of at most 1e+30; correct it or "
            "remove the row",
        ),
        (
            '{"text": "a", "value": "1"}\n', "a.jsonl",
            "line 1, column 'value': the value must be a number, not a string",
        ),
        ("text,value\na,1\n", "a.csv", "the file has only 1 row; at least 10 are needed"),
        (
            "text,value\n" + "a,1\n" * 10, "a.csv",
            "all 10 rows have the value 1; add rows of other values",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_them(data: str, name: str, error: str) -> None:
    assert refused(data.encode(), name) == [error]


def test_columns_of_a_wrong_type() -> None:
    columns: dict[str, object] = {"text": ["a"], "labels": ["x"]}
    assert refused(parquet(columns), "a.parquet") == [
        "column 'labels': the type is 'string' but must be a list of strings or integers; cast the "
        "column"
    ]
    columns = {"text": ["a"], "value": ["1"]}
    assert refused(parquet(columns), "a.parquet") == [
        "column 'value': the type is 'string' but must be an integer, a float or a decimal; cast "
        "the column"
    ]
