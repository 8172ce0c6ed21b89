"""What `graft train` uploads: a file as it is, or a folder of class folders packed into a zip.

Images are compressed already, so the zip only stores them. Not here: parsing; that is the worker's
work, and its errors come back with line and reason.
"""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai.types import FileObject
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)

from cli.client import UPLOAD_SECONDS, Client
from cli.failures import CommandError
from core.datasets import Modality
from core.identifiers import is_identifier

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
TEXT_SUFFIXES = frozenset({".csv", ".jsonl", ".parquet"})
MAX_FILES = 200_000
MAX_ZIP_BYTES = 4 << 30
DEFAULT_BACKBONES = {Modality.TEXT: "minilm", Modality.IMAGE: "efficientnet-lite0"}


@dataclass(frozen=True)
class Source:
    """A data set on this machine, and what its kind says a row most likely holds."""

    path: Path
    modality: Modality

    @property
    def default_backbone(self) -> str:
        """The backbone for this kind of row."""
        return DEFAULT_BACKBONES[self.modality]

    @property
    def default_name(self) -> str:
        """A model name made of the file's, such as `support-intents`."""
        name = re.sub(r"[^a-z0-9_-]+", "-", self.path.resolve().stem.lower()).strip("-_")[:63]
        return name if is_identifier(name) else "model"


def find_source(path: Path) -> Source:
    """Look at a path; raise `CommandError` when it cannot be a data set."""
    if path.is_dir():
        return Source(path, Modality.IMAGE)
    if not path.is_file():
        raise CommandError(f"{path} does not exist")
    suffix = path.suffix.lower()
    if suffix == ".zip":
        return Source(path, Modality.IMAGE)
    if suffix in TEXT_SUFFIXES:
        return Source(path, Modality.TEXT)
    raise CommandError(
        f"{path} is not a data set: give a .csv, .jsonl, .parquet or .zip file, "
        "or a folder with one folder of images per class"
    )


@contextmanager
def packed(source: Source) -> Iterator[Path]:
    """Give the file to upload; a folder's zip is removed afterwards."""
    if source.path.is_file():
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="graft-") as scratch:
        target = Path(scratch) / f"{source.default_name}.zip"
        pack_folder(source.path, target)
        yield target


def pack_folder(folder: Path, target: Path, *, max_bytes: int = MAX_ZIP_BYTES) -> int:
    """Store the files of a folder in a zip, as they lie; return how many there are."""
    files = find_files(folder)
    if sum(file.stat().st_size for file in files) > max_bytes:
        raise CommandError(f"{folder} holds more than {max_bytes:,} bytes")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for file in files:
            archive.write(file, file.relative_to(folder).as_posix())
    return len(files)


def find_files(folder: Path, *, max_files: int = MAX_FILES) -> list[Path]:
    """Return all files below `folder`, sorted, whatever they are; hidden ones are left out.

    What cannot be trained on, such as a GIF or an image that lies too deep, is for the service to
    name: left out here, it would be a row that the user believes was trained on.
    """
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
        if len(found) > max_files:
            raise CommandError(f"{folder} holds more than {max_files:,} files")
    if not any(path.suffix.lower() in IMAGE_SUFFIXES for path in found):
        raise CommandError(
            f"{folder} holds no images: expected {folder.name}/<class>/<image>.jpg, .png or .webp"
        )
    for path in found:
        if not path.is_file():
            raise CommandError(f"{path} is not a file; remove it from the data set")
    return sorted(found)


def upload(client: Client, path: Path, console: Console) -> FileObject:
    """Upload a file with a progress bar."""
    columns = (
        TextColumn("upload {task.description}"), BarColumn(), DownloadColumn(),
        TransferSpeedColumn(),
    )  # fmt: skip
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        progress.open(path, "rb", description=path.name) as content,
    ):
        return client.openai.files.create(
            file=(path.name, content), purpose="fine-tune", timeout=UPLOAD_SECONDS
        )
