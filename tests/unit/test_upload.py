"""The upload: the file's bytes come out of the form, however it was cut, or it is refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest, PayloadTooLarge, UnsupportedMedia
from core.store import ArtifactStore
from service.ingest import MAX_FIELD_BYTES, MAX_FIELDS, MAX_FILENAME, Upload

BOUNDARY = b"b0undary"
TYPE = "multipart/form-data; boundary=b0undary"
LIMIT = 10_000


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    extra = f'; filename="{filename}"' if filename is not None else ""
    head = f'Content-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
    return b"--" + BOUNDARY + b"\r\n" + head.encode() + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[begin:end] for begin, end in pairwise(edges)]


async def body(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def read(chunks: Sequence[bytes], content_type: str = TYPE) -> tuple[Upload, bytes]:
    async def run() -> tuple[Upload, bytes]:
        upload = Upload(content_type, body(chunks), max_bytes=LIMIT)
        return upload, b"".join([chunk async for chunk in upload.chunks()])

    return asyncio.run(run())


# Bytes that look like the envelope are the ones to get wrong.
TRICKY = st.lists(
    st.sampled_from([b"\r", b"\n", b"--", b"\r\n--", b"--b0undar", b"b0undary", b"x" * 50]),
    max_size=20,
).map(b"".join)
CONTENT = (st.binary(max_size=500) | TRICKY).filter(lambda data: b"\r\n--" + BOUNDARY not in data)
CUTS = st.lists(st.integers(0, 2000), max_size=40)


@given(CONTENT, CUTS)
def test_however_a_form_is_cut_the_same_bytes_come_out(content: bytes, places: list[int]):
    whole = form(part("purpose", b"fine-tune"), part("file", content, "a.csv"))
    upload, data = read(cut(whole, places))
    assert data == content
    assert (upload.filename, upload.bytes) == ("a.csv", len(content))
    assert upload.fields == {"purpose": "fine-tune"}


def test_byte_by_byte():
    whole = form(part("file", b"\r\n--b0undarx\r\n", "a.csv"), part("purpose", b"fine-tune"))
    upload, data = read([whole[n : n + 1] for n in range(len(whole))])
    assert data == b"\r\n--b0undarx\r\n"
    assert upload.fields == {"purpose": "fine-tune"}


@given(st.integers(0, 150), CUTS)
def test_a_form_that_is_cut_short_is_refused(end: int, places: list[int]):
    whole = form(part("file", b"text,label\n" * 3, "a.csv"), part("purpose", b"fine-tune"))
    complete = whole.rindex(b"--")
    with pytest.raises(InvalidRequest):
        read(cut(whole[: min(end, complete)], places))


@given(st.binary(max_size=400), CUTS)
def test_garbage_is_refused_or_harmless(garbage: bytes, places: list[int]):
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    for data in (garbage, b"--" + BOUNDARY + b"\r\n" + garbage, form(garbage)):
        with pytest.raises(InvalidRequest):
            read(cut(data, places))


@given(st.binary(max_size=300), st.integers(0, 500), CUTS)
def test_a_damaged_form_never_raises_anything_but_ours(junk: bytes, at: int, places: list[int]):
    whole = form(part("purpose", b"fine-tune"), part("file", b"text,label\n" * 9, "a.csv"))
    at %= len(whole)
    with suppress(InvalidRequest):
        read(cut(whole[:at] + junk + whole[at:], places))


REFUSED = {
    "two files": form(part("file", b"1", "a"), part("file", b"2", "b")),
    "no file": form(part("purpose", b"fine-tune")),
    "a file without a name": form(part("file", b"1")),
    "a file under another name": form(part("upload", b"1", "a.csv")),
    "a huge field": form(part("purpose", b"x" * (MAX_FIELD_BYTES + 1)), part("file", b"1", "a")),
    "too many fields": form(*(part(f"f{n}", b"") for n in range(MAX_FIELDS + 1))),
    "a huge header": b"--" + BOUNDARY + b"\r\nX: " + b"x" * 100_000,
    "too many headers": b"--" + BOUNDARY + b"\r\n" + b"X-A: b\r\n" * 1000,
    "nothing": b"",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("step", [1, 1 << 16])
def test_these_forms_are_refused(data: bytes, step: int):
    with pytest.raises(InvalidRequest):
        read([data[n : n + step] for n in range(0, len(data), step)])


@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=",
     "multipart/mixed; boundary=b0undary", "multipart/form-data; boundary*=x''%ff", ";;;="],
)  # fmt: skip
def test_what_is_no_form_is_refused(content_type: str):
    with pytest.raises((UnsupportedMedia, InvalidRequest)):
        read([form(part("file", b"1", "a"))], content_type)


# What a header may hold: bytes, seen as Latin-1.
@given(st.text(st.characters(max_codepoint=255), max_size=80) | st.just("x" * 1000))
def test_any_content_type_is_read_or_refused(content_type: str):
    for text in (content_type, "multipart/form-data; boundary=" + content_type):
        with suppress(UnsupportedMedia):
            Upload(text, body([]), max_bytes=1)


def test_a_file_is_bounded_and_exactly_so():
    upload, _ = read([form(part("file", b"x" * LIMIT, "a"))])
    assert upload.bytes == LIMIT
    with pytest.raises(PayloadTooLarge):
        read([form(part("file", b"x" * (LIMIT + 1), "a"))])


def test_a_file_name_is_bounded_and_only_a_label():
    upload, _ = read([form(part("file", b"1", "../../" + "é" * 300))])
    assert upload.filename is not None
    assert len(upload.filename) == MAX_FILENAME
    upload, _ = read([form(b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="file"; '
                           b'filename="\xff\xfe"\r\n\r\n1\r\n')])  # fmt: skip
    assert upload.filename == "\ufffd\ufffd"


@pytest.mark.parametrize("size", [0, 1, 9_000, 6_000_000])
@pytest.mark.anyio
async def test_a_refused_upload_leaves_nothing_in_the_store(tmp_path: Path, size: int):
    store = ArtifactStore(str(tmp_path))
    data = b"".join([part("file", b"x" * size, "a"), part("file", b"2", "b")])
    chunks = [data[n : n + 65_536] for n in range(0, len(data), 65_536)]
    upload = Upload(TYPE, body(chunks), max_bytes=10_000_000)
    with pytest.raises(InvalidRequest, match="one file"):
        await store.put_stream("default/files/file-1/upload", upload.chunks())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.anyio
async def test_a_caller_that_goes_away_leaves_nothing_in_the_store(tmp_path: Path):
    store = ArtifactStore(str(tmp_path))
    reached = asyncio.Event()

    async def hanging() -> AsyncIterator[bytes]:
        yield part("file", b"x" * 6_000_000, "a")[:-2]
        reached.set()
        await asyncio.Event().wait()

    upload = Upload(TYPE, hanging(), max_bytes=10_000_000)
    task = asyncio.create_task(store.put_stream("default/files/file-1/upload", upload.chunks()))
    async with asyncio.timeout(10):
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while [path for path in tmp_path.rglob("*") if path.is_file()]:
            await asyncio.sleep(0.01)
