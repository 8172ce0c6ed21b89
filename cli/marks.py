"""Finds and ends every process of a stack, however deep in the tree and whoever its parent is now.

Each child of a stack carries the environment variable `GRAFT_STACK=<mark>`, and so does all that it
starts. A process group would not do: BentoML's processes open sessions of their own, and an orphan
would keep the port. Standard library only, because `cli.guard` must start fast and never fail.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

VARIABLE = "GRAFT_STACK"
POLL_SECONDS = 0.05


def find_marked(mark: str) -> list[int]:
    """Return the ids of all live processes whose mark begins with `mark`."""
    sought = f"{VARIABLE}={mark}"
    if sys.platform == "linux":
        return _search_proc(sought.encode(), Path("/proc"))
    listing = subprocess.run(
        ["/bin/ps", "-axEwwo", "pid=,command="], capture_output=True, text=True, check=False
    )  # fmt: skip
    return _search_listing(sought, listing.stdout.splitlines())


def end_marked(mark: str, grace_seconds: float, kill_seconds: float = 5) -> list[int]:
    """Ask all marked processes to stop, kill those left after the grace; return who still lives."""
    _signal(find_marked(mark), signal.SIGTERM)
    if _gone_within(mark, grace_seconds):
        return []
    deadline = time.monotonic() + kill_seconds
    # One that was just forked is seen only the next time round.
    while (left := find_marked(mark)) and time.monotonic() < deadline:
        _signal(left, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return left


def _gone_within(mark: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while find_marked(mark):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _signal(processes: Iterable[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def _search_proc(sought: bytes, proc: Path) -> list[int]:
    found = []
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            environment = (entry / "environ").read_bytes().split(b"\0")
            if any(variable.startswith(sought) for variable in environment):
                found.append(int(entry.name))
    return found


def _search_listing(sought: str, lines: Iterable[str]) -> list[int]:
    return [int(line.split(maxsplit=1)[0]) for line in lines if f" {sought}" in line]
