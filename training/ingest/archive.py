"""Reading a zip that a stranger made.

Nothing is ever extracted to a path. Before any entry is unpacked, the whole directory is held
against the limits; then `read_entry` unpacks one at a time, in bounded steps, and compares what
came out with what the directory said. `zipfile` itself stops at the declared size and checks the
CRC; what it does not do is bound its directory, ratios, names and overlaps.

Not here: what the entries mean (training.ingest.images).
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from io import SEEK_END
from typing import IO, BinaryIO, cast

from core.datasets import RowError
from training.ingest.findings import entry_name
from training.ingest.limits import MAX_IMAGE_BYTES, MIB, Limits
from training.ingest.rows import Unusable, too_many_image_bytes

_ENTRY_SIGNATURE = b"PK\x01\x02"
_LOCAL_HEADER_BYTES = 30
_DIRECTORY_BYTES_PER_ENTRY = 512
# Below this a high ratio is nothing but a small picture of one colour.
_RATIO_FREE_BYTES = 65_536
_ENCRYPTED_FLAGS = 0x1 | 0x40
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DRIVE = re.compile(r"[A-Za-z]:")
_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, IndexError,
    NotImplementedError, RuntimeError, OverflowError,
)  # fmt: skip


class _TooManyEntriesError(Exception):
    """Raised inside `zipfile` when the directory holds more than the limit."""


class _DirectoryGuard:
    """A file that bounds what `zipfile` reads while it opens an archive.

    The directory is read in one call whose size the archive itself declares, and each entry in it
    becomes an object of a kilobyte, so both are bounded before `zipfile` sees the bytes.
    """

    def __init__(self, source: BinaryIO, max_entries: int) -> None:
        self._source = source
        self._max_entries = max_entries
        self._size = source.seek(0, SEEK_END)
        self.seek = source.seek
        self.tell = source.tell
        self.seekable = source.seekable
        self.opening = True

    def read(self, size: int = -1) -> bytes:
        if not self.opening:
            return self._source.read(size)
        left = max(0, self._size - self._source.tell())
        size = left if size < 0 else min(size, left)
        if size > MIB + self._max_entries * _DIRECTORY_BYTES_PER_ENTRY:
            raise _TooManyEntriesError
        data = self._source.read(size)
        if data.count(_ENTRY_SIGNATURE) > self._max_entries:
            raise _TooManyEntriesError
        return data


def open_archive(source: BinaryIO, limits: Limits) -> zipfile.ZipFile | RowError:
    """Return the archive, its directory within the limits, or why it is refused."""
    guard = _DirectoryGuard(source, limits.max_zip_entries)
    try:
        archive = zipfile.ZipFile(cast("IO[bytes]", guard))
    except _TooManyEntriesError:
        return RowError(
            reason=f"the zip has more than {limits.max_zip_entries} entries; upload fewer images"
        )
    except _UNREADABLE:
        return RowError(reason="the zip is damaged or cut off; create the archive again")
    guard.opening = False
    problem = _directory_problem(archive.infolist(), source.seek(0, SEEK_END), limits)
    if problem is None:
        return archive
    archive.close()
    return problem


def _directory_problem(
    entries: list[zipfile.ZipInfo], archive_bytes: int, limits: Limits
) -> RowError | None:
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > limits.max_unpacked_bytes:
        return RowError(
            reason=f"the zip unpacks to {unpacked} bytes; "
            f"at most {limits.max_unpacked_bytes} are allowed: upload fewer or smaller images"
        )
    if unpacked > max(_RATIO_FREE_BYTES, limits.max_zip_ratio * archive_bytes):
        return RowError(
            reason=f"the zip unpacks to more than {limits.max_zip_ratio} times its size; "
            "upload images only"
        )
    return _overlap(entries, archive_bytes)


def _overlap(entries: Iterable[zipfile.ZipInfo], archive_bytes: int) -> RowError | None:
    """Find entries that share bytes: a bomb packs one piece of data and refers to it many times."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        start = entry.header_offset
        own_end = start + _LOCAL_HEADER_BYTES + len(entry.orig_filename) + entry.compress_size
        if start < end or own_end > archive_bytes:
            return RowError(
                entry=entry_name(stored_name(entry)),
                reason="the entry overlaps another one or the end; create the archive again",
            )
        end = own_end
    return None


def stored_name(entry: zipfile.ZipInfo) -> str:
    """Return an entry's name, with the NUL at which `zipfile` would cut it."""
    return entry.orig_filename if "\0" in entry.orig_filename else entry.filename


def name_problem(name: str) -> str | None:
    """Return why an entry's name is unsafe, although nothing is ever written under it."""
    if "\\" in name:
        return "the name contains a backslash; create the archive with '/' between folders"
    if name.startswith("/") or _DRIVE.match(name):
        return "the name is an absolute path; create the archive from inside the folder"
    if ".." in name.split("/"):
        return "the name climbs out of the archive with '..'; create the archive again"
    if "\0" in name:
        return "the name contains a NUL byte; rename the file"
    return None


def entry_problem(entry: zipfile.ZipInfo, limits: Limits) -> str | None:
    """Return why an entry cannot be unpacked, going by the directory."""
    file_type = stat.S_IFMT(entry.external_attr >> 16)
    if file_type == stat.S_IFLNK:
        return "the entry is a symbolic link; put the file itself into the archive"
    if file_type not in (0, stat.S_IFREG):
        return "the entry is not a regular file; remove it"
    if entry.flag_bits & _ENCRYPTED_FLAGS:
        return "the entry is encrypted; create the archive without a password"
    if entry.compress_type not in _METHODS:
        return "the compression method is not supported; create the archive with 'deflate'"
    if entry.file_size > max(_RATIO_FREE_BYTES, limits.max_zip_ratio * entry.compress_size):
        return (
            f"the entry unpacks to more than {limits.max_zip_ratio} times its size, "
            "as no image does; remove it"
        )
    return None


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes | Unusable:
    """Unpack one entry that `entry_problem` found nothing against."""
    if entry.file_size > MAX_IMAGE_BYTES:
        return Unusable(too_many_image_bytes(entry.file_size))
    data = bytearray()
    try:
        with archive.open(entry) as file:
            while piece := file.read(MIB):
                data += piece
    except _UNREADABLE:
        return Unusable(
            "the entry is damaged, or its size is not the one declared; create the archive again"
        )
    if len(data) != entry.file_size:
        return Unusable("the entry's size is not the one declared; create the archive again")
    return bytes(data)
