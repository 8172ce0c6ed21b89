"""JSONL uploads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from core.datasets import FileErrors
from tests.unit.ingest_builders import (
    GOOD_ROWS,
    accepted,
    jsonl,
    limits,
    parse,
    parse_measured,
    refused,
)

REST = jsonl(*({"text": text, "label": label} for text, label in GOOD_ROWS))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("escaped", [True, False])
def test_objects_with_any_newlines_and_other_keys(newline: str, bom: str, escaped: bool) -> None:
    rows = [*GOOD_ROWS, ("größe\r\n東京 🙂\u2028", "greet")]
    lines = [
        json.dumps({"id": [i], "text": text, "label": label}, ensure_ascii=escaped)
        for i, (text, label) in enumerate(rows)
    ]
    assert accepted((bom + newline.join(lines)).encode(), "a.jsonl") == rows


def test_integers_are_labels() -> None:
    data = jsonl(*({"text": "a", "label": label} for label in (0, 0, -7, -7)))
    assert [label for _, label in accepted(data, "a.json")] == ["0", "0", "-7", "-7"]


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        ([1, 1, "a", "a"], "the label 'a' is a string at line 3 but an integer at line 1"),
        (["a", "a", "b", 1], "the label '1' is an integer at line 4 but a string at line 1"),
    ],
)
def test_integer_and_string_labels_do_not_mix(labels: list[object], error: str) -> None:
    [found] = refused(jsonl(*({"text": "a", "label": label} for label in labels)), "a.jsonl")
    assert error in found
    assert found.endswith("; use one type in the whole file, for example all strings")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ("[1]", ': the line must be an object like {"text": …, "label": …}, not a list'),
        ("null", ': the line must be an object like {"text": …, "label": …}, not null'),
        (
            '{"text": "a" "label"}',
            ": not valid JSON at character 14: Expecting ',' delimiter; correct the line",
        ),
        ('{"text":', ": not valid JSON at character 9: Expecting value; correct the line"),
        ('{"text": "a"} x', ": not valid JSON at character 15: Extra data; correct the line"),
        (
            '{"text": "a", "text": "b", "label": "greet"}',
            ": the key 'text' is there twice; remove one",
        ),
        (
            '{"text": "a", "label": NaN}',
            ": NaN is not JSON; write null, a number or a string",
        ),
        ("[" * 100_000, ": the JSON is nested too deeply; flatten it"),
        (
            '{"text": "a", "label": ' + "1" * 5000 + "}",
            ": a number has too many digits; shorten it",
        ),
        (
            '{"text": "a", "category": "x"}',
            ", column 'label': there is no key 'label', only 'text', 'category'; "
            "rename key 'category' to 'label'",
        ),
        (
            '{"image": "aGk=", "label": "greet"}',
            ", column 'text': images cannot be sent as JSONL; "
            "upload Parquet with an image column, or a zip of images in class folders",
        ),
        (
            '{"text": null, "label": "greet"}',
            ", column 'text': the text is null; fill it in or remove the row",
        ),
        (
            '{"text": 5, "label": "greet"}',
            ", column 'text': the text must be a string, not an integer; put it in double quotes",
        ),
        (
            r'{"text": "a\u0000", "label": "greet"}',
            ", column 'text': the text contains a NUL byte; remove it",
        ),
        (
            r'{"text": "\ud83d", "label": "greet"}',
            ", column 'text': the text contains half of a surrogate pair; "
            "write the character whole",
        ),
        (
            r'{"text": "a", "label": "\ud83d"}',
            ", column 'label': the label contains half of a surrogate pair; "
            "write the character whole",
        ),
        (
            '{"text": "a", "label": null}',
            ", column 'label': the label is null; fill it in or remove the row",
        ),
        (
            '{"text": "a", "label": true}',
            ", column 'label': the label must be a string or an integer, not true or false",
        ),
        (
            '{"text": "a", "label": 1.0}',
            ", column 'label': the label must be a string or an integer, "
            "not a number with a fraction",
        ),
        (
            '{"text": "a", "label": ["x"]}',
            ", column 'label': the label must be a string or an integer, not a list",
        ),
        (
            '{"text": "a", "label": {}}',
            ", column 'label': the label must be a string or an integer, not an object",
        ),
    ],
)
def test_a_bad_line_is_an_error_at_that_line(row: str, error: str) -> None:
    # Blank lines count as lines.
    data = b"\n" + REST + b"\n" + row.encode() + b"\n" + REST
    assert refused(data, "a.jsonl") == [f"line 7{error}"]


def test_a_row_with_two_faults_is_reported_with_both() -> None:
    assert refused(b'{"text": "", "label": ""}\n' + REST, "a.jsonl") == [
        "line 1, column 'text': the text is blank; fill it in or remove the row",
        "line 1, column 'label': the label is blank; fill it in or remove the row",
    ]


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (json.dumps([{"text": "a", "label": "b"}]), "a JSON list"),
        (json.dumps([{"text": "a", "label": "b"}], indent=1), "a JSON list"),
        (json.dumps({"text": "a", "label": "b"}, indent=1), "JSON over several lines"),
    ],
)
def test_json_that_is_not_jsonl(data: str, shape: str) -> None:
    assert refused(data.encode(), "a.json") == [
        f'line 1: the file is {shape}; write JSONL: one {{"text": …, "label": …}} per line'
    ]


def test_not_json_at_all() -> None:
    outcome, _ = parse(b"hello\nworld\n", "a.jsonl")
    assert isinstance(outcome, FileErrors)
    assert outcome.total == 2


def test_the_longest_text_is_accepted_however_it_is_escaped() -> None:
    small = limits(max_text_chars=50)
    rows = [{"text": "🙂" * 50, "label": label} for label in "aabb"]
    assert accepted(jsonl(*rows), "a.jsonl", small)[0] == ("🙂" * 50, "a")
    assert refused(jsonl({"text": "a" * 51, "label": "a"}) + jsonl(*rows), "a.jsonl", small) == [
        "line 1, column 'text': the text is 51 characters long; shorten it to 50"
    ]


def test_a_line_that_is_too_long_does_not_hide_the_next() -> None:
    small = limits(max_text_chars=10)
    data = REST + jsonl({"text": "a" * 100_000}) + jsonl({"text": "b", "label": ""})
    assert refused(data, "a.jsonl", small) == [
        f"line 5: the line is longer than {small.max_row_bytes} bytes; shorten it",
        "line 6, column 'label': the label is blank; fill it in or remove the row",
    ]


def test_latin_1_is_an_error_with_line_and_offset() -> None:
    data = REST + '{"text": "é", "label": "x"}\n'.encode("latin-1")
    assert refused(data, "a.jsonl") == [
        f"line 5: byte 0xe9 at offset {len(REST) + 10} is not UTF-8; save the file as UTF-8"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_200_mb_line_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"a" * 1_000_000)
    mib, errors = parse_measured(path)
    assert errors == "line 1: the line is longer than 305536 bytes; shorten it"
    assert mib < 30
