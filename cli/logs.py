"""Log files of the stack's processes: each bounded, with the one before it kept beside it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

MAX_LOG_BYTES = 8 << 20


def previous(path: Path) -> Path:
    """Return where the log before this one is kept: `worker.log` → `worker.previous.log`."""
    return path.with_suffix(f".previous{path.suffix}")


def begin(path: Path) -> None:
    """Begin an empty log and keep the last run's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        path.replace(previous(path))
    path.touch()


def trim(path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Move what a log holds to the previous one when it has grown beyond `max_bytes`.

    The file is emptied in place, since a process has it open for appending; lines written between
    the copy and the cut are lost. So is all of it where there is no room for the copy: a log must
    not keep a disk full. One that somebody removed is none.
    """
    with suppress(FileNotFoundError):
        if path.stat().st_size > max_bytes:
            with suppress(OSError):
                shutil.copyfile(path, previous(path))
            os.truncate(path, 0)


def last_lines(path: Path, count: int = 20) -> str:
    """Return the end of a log, to be shown when its process failed."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-count:])
