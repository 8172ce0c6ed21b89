"""CSV uploads."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from tests.unit.ingest_builders import GOOD_ROWS, accepted, limits, parse_measured, refused

REST = "a,x\nb,x\nc,y\nd,y\n"
REST_ROWS = [("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_what_spreadsheets_write(newline: str, delimiter: str, bom: str) -> None:
    rows = [*GOOD_ROWS, ("größe, 東京; 🙂", "greet")]
    lines = [delimiter.join(('"text"', "label"))]
    lines += [delimiter.join((f'"{text}"', label)) for text, label in rows]
    assert accepted((bom + newline.join(lines)).encode(), "a.csv") == rows


def test_quoted_newlines_quotes_blank_lines_and_other_columns() -> None:
    data = (
        'id, label ,text\n\n1,x,"two\r\nlines, ""quoted"""\n\n\n2,x,b\n3,y,c "inside"\n4,y,'
        + " d \n"
    )
    assert accepted(data.encode(), "a.csv") == [
        ('two\r\nlines, "quoted"', "x"),
        ("b", "x"),
        ('c "inside"', "y"),
        (" d ", "y"),
    ]


def test_numbers_are_string_labels() -> None:
    assert accepted(b"text,label\na,1\nb,1\nc,one\nd,one\n", "a.csv") == [
        ("a", "1"), ("b", "1"), ("c", "one"), ("d", "one"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (
            "text,category",
            "line 1, column 'label': there is no column 'label', only 'text', 'category'; "
            "rename column 'category' to 'label'",
        ),
        (
            "id;text;Intent",
            "line 1, column 'label': there is no column 'label', only 'id', 'text', 'Intent'; "
            "rename column 'Intent' to 'label'",
        ),
        (
            "text,a,b",
            "line 1, column 'label': there is no column 'label', only 'text', 'a', 'b'; "
            "name the column that holds the label 'label'",
        ),
        (
            "utterance,label",
            "line 1, column 'text': there is no column 'text', only 'utterance', 'label'; "
            "rename column 'utterance' to 'text'",
        ),
        (
            "text,label,label",
            "line 1, column 'label': the header has 2 columns 'label'; "
            "rename or remove all but one",
        ),
    ],
)
def test_a_header_without_the_columns(header: str, error: str) -> None:
    assert refused(f"{header}\n{REST}".encode(), "a.csv") == [error]


def test_a_header_without_any_of_them_gives_two_errors() -> None:
    found = refused(b"\n" + REST.encode(), "a.csv")
    assert [error.split(":")[0] for error in found] == [
        "line 2, column 'text'",
        "line 2, column 'label'",
    ]


def test_a_header_with_an_open_quote() -> None:
    assert refused(b'"text,label\na,b\n', "a.csv") == [
        "line 1: a double quote that opens in this row is never closed; close it"
    ]


def test_blank_lines_only() -> None:
    assert refused(b"\n\n", "a.csv") == ["line 1: the file has no header; begin it with text,label"]


RAGGED = "put double quotes around a field that contains ',', and fill in missing ones"
NUL = "the text contains a NUL byte; remove it"


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ("a,b,c", f": the row has 3 fields but the header has 2; {RAGGED}"),
        ("a", f": the row has 1 field but the header has 2; {RAGGED}"),
        (" ,x", ", column 'text': the text is blank; fill it in or remove the row"),
        ("a, ", ", column 'label': the label is blank; fill it in or remove the row"),
        ("a\0b,x", f", column 'text': {NUL}"),
        ("a,x\0", r", column 'label': the label 'x\x00' contains a control character; remove it"),
        ('"a\n\nb\0",x', f", column 'text': {NUL}"),
        ("a" * 11 + ",x", ", column 'text': the text is 11 characters long; shorten it to 10"),
        (
            "a," + "x" * 201,
            f", column 'label': the label '{'x' * 40}…' is 201 characters long; shorten it to 200",
        ),
        (
            '"a"b,x',
            ": text follows a closing double quote; "
            'write a double quote inside a quoted field twice ("")',
        ),
        ("a\rb,x", ": a carriage return stands outside quotes; put the field in double quotes"),
    ],
)
def test_a_bad_row_is_an_error_at_its_first_line(row: str, error: str) -> None:
    # The row before spans lines 2 to 4.
    data = f'text,label\n"a\nb\nc",x\n{row}\n{REST}'.encode()
    assert refused(data, "a.csv", limits(max_text_chars=10)) == [f"line 5{error}"]


def test_lines_after_bad_rows_are_still_counted_right() -> None:
    data = b'text,label\n"a"b,x\n"q\nq",x\n\na\n,y\n'
    assert [error.split(":")[0] for error in refused(data, "a.csv")] == [
        "line 2",
        "line 6",
        "line 7, column 'text'",
    ]


def test_a_quote_that_is_never_closed() -> None:
    assert refused(f'text,label\n{REST}"a,x\n{REST}'.encode(), "a.csv") == [
        "line 6: a double quote that opens in this row is never closed; close it"
    ]


def test_an_open_quote_swallows_no_more_than_a_row_may_hold() -> None:
    small = limits(max_text_chars=10)
    filler = "".join(f"row {i},x\n" for i in range(20_000))
    data = f'text,label\na,x\n"b,x\n{filler}e\0,y\n{REST}'.encode()
    assert refused(data, "a.csv", small) == [
        f"line 3: the row that begins here is longer than {small.max_row_bytes} bytes; "
        "close its double quote or shorten it",
        f"line 20004, column 'text': {NUL}",
    ]


def test_latin_1_is_one_error_with_line_and_offset() -> None:
    data = f"text,label\n{REST}café,x\nthé,x\n,x\n".encode("latin-1")
    offset = data.index(b"\xe9")
    assert refused(data, "a.csv") == [
        f"line 6: byte 0xe9 at offset {offset} is not UTF-8; save the file as UTF-8",
        "line 8, column 'text': the text is blank; fill it in or remove the row",
    ]


def test_the_byte_offset_counts_a_bom() -> None:
    data = b"\xef\xbb\xbfte\xffxt,label\n"
    assert refused(data, "a.csv") == [
        "line 1: byte 0xff at offset 5 is not UTF-8; save the file as UTF-8"
    ]


def test_a_field_may_be_longer_than_the_csv_modules_own_limit() -> None:
    before = csv.field_size_limit()
    long = "long " * 40_000
    data = f"text,label\n{long},x\n{REST}".encode()
    assert accepted(data, "a.csv", limits(max_text_chars=200_000))[0] == (long, "x")
    assert csv.field_size_limit() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("piece", [b"a" * 1000, b'"\n",' * 250, b"," * 1000])
def test_a_200_mb_row_takes_little_memory(tmp_path: Path, piece: bytes) -> None:
    path = tmp_path / "train.csv"
    with path.open("wb") as file:
        file.write(b"text,label\na,x\n")
        for _ in range(200):
            file.write(piece * 1000)
    mib, errors = parse_measured(path)
    assert "line 3: the " in errors
    assert "longer than 305536 bytes" in errors
    assert mib < 60
