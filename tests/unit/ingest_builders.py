"""Uploads to test with: small good ones, and what no library would write."""

from __future__ import annotations

import io
import json
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from core.datasets import DatasetManifest, FileErrors
from core.settings import Settings
from training.ingest import Limits, parse_upload

ROOT = Path(__file__).parents[2]
LIMITS = Limits.from_settings(Settings())
GOOD_ROWS = [("good day", "greet"), ("hello", "greet"), ("bye", "leave"), ("see you", "leave")]


def limits(**changes: int) -> Limits:
    return replace(LIMITS, **changes)


def parse(
    data: bytes, filename: str, limits: Limits = LIMITS
) -> tuple[DatasetManifest | FileErrors, bytes]:
    """Return the outcome and the normal form."""
    sink = io.BytesIO()
    return parse_upload(io.BytesIO(data), filename, limits, sink), sink.getvalue()


def accepted(data: bytes, filename: str, limits: Limits = LIMITS) -> list[tuple[object, str]]:
    """Return the rows of the normal form of an upload that must be good."""
    outcome, normal_form = parse(data, filename, limits)
    assert isinstance(outcome, DatasetManifest), outcome
    table = pq.read_table(io.BytesIO(normal_form))
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def refused(data: bytes, filename: str, limits: Limits = LIMITS) -> list[str]:
    """Return the errors, in words, of an upload that must be bad."""
    outcome, _ = parse(data, filename, limits)
    assert isinstance(outcome, FileErrors), outcome
    assert outcome.total >= len(outcome.errors) > 0
    return [str(error) for error in outcome.errors]


def parquet(columns: dict[str, object], *, metadata: dict[str, str] | None = None) -> bytes:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def image(form: str = "PNG", *, size: int = 8, seed: int = 0) -> bytes:
    """A picture of noise, which does not compress."""
    pixels = random.Random(seed).randbytes(size * size * 3)
    picture = Image.frombytes("RGB", (size, size), pixels)
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def image_zip(files: dict[str, bytes] | None = None) -> bytes:
    """A zip of two classes of two images, or of `files`."""
    if files is None:
        files = {f"{label}/{i}.png": image(seed=i) for label in ("cat", "dog") for i in (1, 2)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def png_header_only(width: int, height: int) -> bytes:
    """A tiny PNG that decodes to `width * height * 3` bytes of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    pixels = zlib.compressobj(9)
    row = bytes(1 + width * 3)
    data = b"".join(pixels.compress(row) for _ in range(height)) + pixels.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@dataclass(frozen=True)
class Entry:
    """One entry of a hand-made zip; None means the honest value."""

    name: bytes
    data: bytes = b""
    method: int = zipfile.ZIP_STORED
    flags: int = 0
    external_attr: int = 0
    declared_size: int | None = None
    crc: int | None = None
    offset: int | None = None


def raw_zip(entries: Sequence[Entry]) -> bytes:
    """A zip as its entries say, true or not."""
    body, directory = b"", b""
    for entry in entries:
        packed = entry.data
        if entry.method == zipfile.ZIP_DEFLATED:
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = packer.compress(entry.data) + packer.flush()
        size = len(entry.data) if entry.declared_size is None else entry.declared_size
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        offset = len(body) if entry.offset is None else entry.offset
        shared = struct.pack(
            "<HHHHHIIIHH",
            20, entry.flags, entry.method, 0, 0x21, crc, len(packed), size, len(entry.name), 0,
        )  # fmt: skip
        if entry.offset is None:
            body += b"PK\x03\x04" + shared + entry.name + packed
        directory += (
            b"PK\x01\x02" + struct.pack("<H", 0x0314) + shared
            + struct.pack("<HHHII", 0, 0, 0, entry.external_attr, offset) + entry.name
        )  # fmt: skip
    count = min(len(entries), 0xFFFF)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


_MEASURE = """
import sys
from core.settings import Settings
from training.ingest import Limits, parse_upload
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
before = memory("VmHWM")
with open(sys.argv[1], "rb") as upload, open(sys.argv[2], "w+b") as sink:
    outcome = parse_upload(upload, sys.argv[1], Limits.from_settings(Settings()), sink)
print(memory("VmHWM") - before)
print("; ".join(map(str, outcome.errors)))
"""


def parse_measured(path: Path) -> tuple[float, str]:
    """Parse a bad upload in a fresh process; return the MiB that it took and the errors."""
    answer = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), str(path.with_suffix(".sink"))],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    kib, errors = answer.stdout.split("\n", 1)
    return int(kib) / 1024, errors.strip()
