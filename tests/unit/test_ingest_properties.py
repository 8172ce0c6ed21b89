"""Properties of ingest over many uploads: formats agree, and nothing a file holds raises."""

from __future__ import annotations

import csv
import io
import json

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.datasets import DatasetManifest, FileErrors
from tests.unit.ingest_builders import GOOD_ROWS, image_zip, limits, parquet, parse

SETTINGS = settings(
    max_examples=100, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
SMALL = limits(max_pixels=1_000_000, max_unpacked_bytes=1 << 24)

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60
).filter(str.strip)
labels = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)
labels = labels.map(str.strip).filter(bool)


@st.composite
def datasets(draw: st.DrawFn) -> list[tuple[str, str]]:
    classes = draw(st.lists(labels, min_size=2, max_size=4, unique=True))
    rows = [(text, y) for y in classes for text in draw(st.lists(texts, min_size=2, max_size=4))]
    return draw(st.permutations(rows))


def as_csv(rows: list[tuple[str, str]], delimiter: str, newline: str) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(
        buffer, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_NONNUMERIC
    )
    writer.writerows([("text", "label"), *rows])
    return buffer.getvalue().encode()


@SETTINGS
@given(datasets(), st.sampled_from(",;\t"), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_every_format_gives_the_same_normal_form(
    rows: list[tuple[str, str]], delimiter: str, newline: str, escaped: bool
) -> None:
    lines = [json.dumps({"text": t, "label": y}, ensure_ascii=escaped) for t, y in rows]
    columns = {"text": [t for t, _ in rows], "label": [y for _, y in rows]}

    outcome, normal_form = parse(as_csv(rows, delimiter, newline), "a.csv")

    assert isinstance(outcome, DatasetManifest), outcome
    assert outcome.rows == len(rows)
    assert pa.parquet.read_table(io.BytesIO(normal_form)).to_pydict() == columns
    assert parse(newline.join(lines).encode(), "a.jsonl") == (outcome, normal_form)
    assert parse(parquet(columns), "a.parquet") == (outcome, normal_form)


def survives(data: bytes, filename: str) -> None:
    outcome, _ = parse(data, filename, SMALL)
    if isinstance(outcome, FileErrors):
        assert outcome.total >= len(outcome.errors) > 0
        assert "/tmp" not in outcome.summary()
        assert "Traceback" not in outcome.summary()
    FileErrors.model_validate_json(
        FileErrors(errors=getattr(outcome, "errors", ()), total=0).model_dump_json()
    )


filenames = st.sampled_from(["a.csv", "a.jsonl", "a.json", "a.parquet", "a.zip", "a"])
beginnings = st.sampled_from(
    [b"", b"text,label\n", b"{", b"PK\x03\x04", b"PK\x05\x06", b"PAR1", b"\xef\xbb\xbf"]
)


@settings(SETTINGS, max_examples=300)
@given(beginnings, st.binary(max_size=200), st.sampled_from([b"", b"PAR1"]), filenames)
def test_random_bytes_never_raise(start: bytes, data: bytes, end: bytes, filename: str) -> None:
    survives(start + data + end, filename)


SEEDS = {
    "a.csv": as_csv(GOOD_ROWS, ",", "\n"),
    "a.jsonl": "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in GOOD_ROWS).encode(),
    "a.parquet": parquet({"text": [t for t, _ in GOOD_ROWS], "label": [y for _, y in GOOD_ROWS]}),
    "a.zip": image_zip(),
}
damages = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["flip", "cut", "insert", "remove"]),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("filename", SEEDS)
@settings(SETTINGS, max_examples=150)
@given(damage=damages)
def test_damaged_files_never_raise(filename: str, damage: list[tuple[float, str, bytes]]) -> None:
    data = bytearray(SEEDS[filename])
    for where, what, junk in damage:
        at = int(where * len(data))
        if what == "flip":
            data[at : at + 1] = junk[:1]
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = junk
        else:
            del data[at : at + len(junk)]
    survives(bytes(data), filename)
