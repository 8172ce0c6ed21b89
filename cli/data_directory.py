"""A stack's data directory, which one stack at a time may use.

The lock is on an open file, so it ends with the last process that holds it, however that dies. A
file descriptor that a child inherits holds it too.
"""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import IO

from cli.failures import CommandError

LOCK = "graft.lock"


def claim(data: Path, *, is_fresh: bool = False) -> IO[str]:
    """Make the directory and return the open lock; with `is_fresh` also empty it.

    Raises `CommandError` when it is in use, or would be emptied and was not made by a stack.
    """
    if is_fresh and data.is_dir() and any(data.iterdir()) and not (data / LOCK).exists():
        raise CommandError(f"{data} holds files of others; choose another directory with --data")
    data.mkdir(parents=True, exist_ok=True)
    lock = (data / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise CommandError(
            f"{data} is in use by another `graft up`; stop that one or choose another with --data"
        ) from None
    if is_fresh:
        _empty(data)
    return lock


def _empty(data: Path) -> None:
    for path in data.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
