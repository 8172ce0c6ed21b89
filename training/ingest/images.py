"""Image uploads: a zip of class folders, `<class>/<file>`, under at most one common folder.

What file managers leave behind (`__MACOSX`, dot files, `Thumbs.db`) is passed over. Everything else
must be a JPEG, PNG or WEBP in a class folder, or it is an error at that entry: a file that is left
out in silence is a row that the user believes was trained on. So a few that cannot be decoded are
left out by name (training.ingest.draft).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from core.datasets import Modality, RowError
from training.ingest.archive import (
    entry_problem,
    name_problem,
    open_archive,
    read_entry,
    stored_name,
)
from training.ingest.findings import entry_name
from training.ingest.limits import Limits
from training.ingest.rows import EncodedImage, Row, Unusable

_LAYOUT = "put each image at <class>/<file>"
_LEFT_BEHIND = {"__MACOSX", "Thumbs.db", "desktop.ini"}
_OFFICE_MARK = "[Content_Types].xml"
_ARCHIVE_MAGIC = b"PK\x03\x04"


def parse(source: BinaryIO, limits: Limits) -> Iterator[Row | RowError]:
    """Yield the images of a zip, and an error for each entry that is not one."""
    archive = open_archive(source, limits)
    if isinstance(archive, RowError):
        yield archive
        return
    with archive:
        entries = archive.infolist()
        if any(entry.filename == _OFFICE_MARK for entry in entries):
            yield RowError(reason="the file is an Office document; save it as 'CSV UTF-8'")
            return
        root = _common_folder(entries)
        seen: set[str] = set()
        for entry in entries:
            found = _read(archive, entry, root, seen, limits)
            if found is not None:
                yield found


def _read(
    archive: zipfile.ZipFile,
    entry: zipfile.ZipInfo,
    root: str | None,
    seen: set[str],
    limits: Limits,
) -> Row | RowError | None:
    name = stored_name(entry)
    shown_as = entry_name(name)
    problem = name_problem(name)
    if problem is not None:
        return RowError(entry=shown_as, reason=problem)
    if _is_ignored(name):
        return None
    if name in seen:
        return RowError(
            entry=shown_as, reason="the name is there twice; rename or remove one of the two"
        )
    seen.add(name)
    label = _class_folder(name, root)
    if isinstance(label, Unusable):
        return RowError(entry=shown_as, reason=label.reason)
    problem = entry_problem(entry, limits)
    content = Unusable(problem) if problem else read_entry(archive, entry)
    if isinstance(content, bytes) and content.startswith(_ARCHIVE_MAGIC):
        content = Unusable("the entry is an archive itself; unpack it and add its images")
    item = EncodedImage(content, name) if isinstance(content, bytes) else content
    return Row(Modality.IMAGE, item, label, entry=shown_as)


def _is_ignored(name: str) -> bool:
    parts = name.split("/")
    return name.endswith("/") or any(part in _LEFT_BEHIND or part.startswith(".") for part in parts)


def _common_folder(entries: list[zipfile.ZipInfo]) -> str | None:
    """Return the one folder that holds all class folders, if there is one."""
    names = map(stored_name, entries)
    parts = [name.split("/") for name in names if not name_problem(name) and not _is_ignored(name)]
    folders = {path[0] for path in parts if len(path) > 1}
    is_nested = any(len(path) > 2 for path in parts)
    return folders.pop() if is_nested and len(folders) == 1 else None


def _class_folder(name: str, root: str | None) -> str | Unusable:
    parts = name.split("/")
    if root is not None and parts[0] == root:
        parts = parts[1:]
    if len(parts) == 1:
        return Unusable(f"the file is in no class folder; {_LAYOUT}")
    if len(parts) > 2:
        return Unusable(
            f"the file is too many folders deep; {_LAYOUT}, under at most one common folder"
        )
    return parts[0]
