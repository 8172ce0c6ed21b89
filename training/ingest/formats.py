"""What format an upload is in: by its first bytes, then by its name.

An extension alone proves nothing: a zip that is named `.csv` is read as a zip. It decides only
between formats without a mark of their own, which are text. Not here: parsing.
"""

from __future__ import annotations

import codecs
from enum import StrEnum
from pathlib import PurePosixPath

from core.datasets import RowError

HEAD_BYTES = 65_536
ACCEPTED = (
    "upload CSV (.csv), JSONL (.jsonl), Parquet (.parquet) or a zip of images in class folders"
)


class Format(StrEnum):
    """The accepted formats."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"
    IMAGES = "images"


_MAGIC = {
    b"PK\x03\x04": Format.IMAGES,
    b"PK\x05\x06": Format.IMAGES,
    b"PAR1": Format.PARQUET,
    b"PARE": Format.PARQUET,
}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
_TEXT = {
    ".csv": Format.CSV,
    ".tsv": Format.CSV,
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".json": Format.JSONL,
}


def detect(head: bytes, filename: str) -> Format | RowError:
    """Return the format of a file that begins with `head`, or why it is none that is accepted."""
    if not head:
        return RowError(reason=f"the file is empty; {ACCEPTED}")
    for magic, form in _MAGIC.items():
        if head.startswith(magic):
            return form
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return RowError(
                reason=f"the file is compressed with {name}; unpack it, then {ACCEPTED}"
            )
    suffix = PurePosixPath(filename).suffix.lower()
    if suffix in (".zip", ".parquet"):
        return RowError(
            reason=f"the file is named {suffix} but does not begin like one; "
            "it may be damaged: create it again"
        )
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:2]:
        return RowError(line=1, reason="the file is not UTF-8 but UTF-16; save the file as UTF-8")
    if b"\r" in head and b"\n" not in head:
        return RowError(
            line=1,
            reason="the lines end in carriage returns only, as on old Macs; "
            "save the file with line feeds, for example as 'CSV UTF-8'",
        )
    # No header of a CSV can begin like a JSON value.
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        return Format.JSONL
    if suffix in _TEXT:
        return _TEXT[suffix]
    return RowError(reason=f"the file is in none of the accepted formats; {ACCEPTED}")
