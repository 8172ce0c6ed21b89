"""Everything a person may send by mistake or malice, and the clear answer it gets."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import openai
import pytest
from PIL import Image

from tests.e2e.live_stack import LiveStack

GOOD = b"text,label\nhello there,greet\nhi friend,greet\nbye now,part\nsee you,part\n"


def rejected(stack: LiveStack, filename: str, data: bytes) -> str:
    """Upload a file that must end in `error`; return the details."""
    file = stack.upload(filename, data)
    assert file.status == "error", file
    assert file.status_details
    return file.status_details


def png(width: int, height: int) -> bytes:
    """A PNG that claims to be of that size and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000, 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def photo(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(data, "JPEG")
    return data.getvalue()


def archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as opened:
        for name, content in entries.items():
            opened.writestr(name, content)
    return data.getvalue()


MANY_CLASSES = b"".join(b"t%d,c%d\n" % (i, i) for i in range(100_000))
IMAGES = {f"{c}/{n}.jpg": photo(c) for c in ("red", "blue") for n in range(2)}
BOMB = archive({**IMAGES, "red/x.jpg": bytes(200_000_000)}, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    ("filename", "data", "says"),
    [
        ("d.csv", b"text,label\nhello,a\nworld,a\nthere,a\n", "class"),
        ("d.csv", b"text,label\nhello,a\nworld,b\n", "row"),
        ("d.csv", b"text,category\nhello,a\nworld,b\n", "rename column 'category' to 'label'"),
        ("d.csv", b"text,label\nhel\0lo,a\nx,a\ny,b\nz,b\n", "line 2"),
        ("d.jsonl", b'{"text":"a","label":1}\n{"text":"b","label":"x"}\n', "line 2"),
        ("d.csv", b"text,label\n" + MANY_CLASSES, "class"),
        ("d.zip", archive({**IMAGES, "red/huge.png": png(13_000, 13_000)}), "red/huge.png"),
        ("d.zip", BOMB, "100 times its size"),
        ("d.zip", archive({**IMAGES, "../../etc/x.jpg": photo("red")}), ".."),
        ("d.zip", archive({**IMAGES, "red/cut.jpg": photo("red")[:300]}), "red/cut.jpg"),
        ("d.pdf", b"%PDF-1.7\n" + bytes(range(256)), "CSV"),
    ],
    ids=["one-class", "one-row-per-class", "no-label-column", "nul", "mixed-types",
         "100000-classes", "13000x13000-png", "zip-bomb", "path-in-zip", "truncated-jpeg",
         "unknown-format"],
)  # fmt: skip
def test_bad_file_ends_in_error_with_the_reason(
    stack: LiveStack, filename: str, data: bytes, says: str
) -> None:
    assert says in rejected(stack, filename, data)


def test_job_on_a_bad_file_is_refused(stack: LiveStack) -> None:
    file = stack.upload("d.csv", b"text,label\nhello,a\nworld,b\n")
    with pytest.raises(openai.BadRequestError) as refused:
        stack.train(file.id, "never")
    assert refused.value.param == "training_file"


def test_job_created_before_its_bad_file_is_parsed_fails_with_the_files_errors(
    stack: LiveStack,
) -> None:
    rows = b"".join(b"some text %d,only\n" % n for n in range(20_000))
    file = stack.openai.files.create(file=("d.csv", b"text,label\n" + rows), purpose="fine-tune")
    job = stack.finished(stack.train(file.id, "never").id)
    assert job.status == "failed"
    assert job.error
    assert job.error.code == "data_error"
    assert job.error.param == "training_file"


def test_empty_file(stack: LiveStack) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        stack.openai.files.create(file=("d.csv", b""), purpose="fine-tune")
    assert refused.value.param == "file"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "gpt-4o"}, "model"),
        ({"model": "hf:/etc"}, "model"),
        ({"model": 7}, "model"),
        ({"training_file": "file-unknown"}, "training_file"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
        ({"suffix": "No Spaces!"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"strategy": "magic"}, "strategy"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_bad_job_names_the_field(stack: LiveStack, change: dict[str, Any], param: str) -> None:
    file = stack.upload("d.csv", GOOD)
    body = {"model": "minilm", "training_file": file.id, **change}
    answer = stack.http.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_text_model_on_images_fails_clearly(stack: LiveStack) -> None:
    file = stack.upload("d.zip", archive(IMAGES))
    assert file.status == "processed"
    job = stack.finished(stack.train(file.id, "never").id)
    assert job.status == "failed"
    assert job.error
    assert (job.error.code, job.error.param) == ("data_error", "model")


def test_unknown_model_is_404(stack: LiveStack) -> None:
    answer = stack.http.post("/v1/predict", json={"model": "nobody", "inputs": ["x"]})
    assert answer.status_code == 404
    with pytest.raises(openai.NotFoundError):
        stack.openai.models.retrieve("nobody")
