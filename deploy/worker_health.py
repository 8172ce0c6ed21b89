"""Is the worker well? Exits with 0 when every kind of job has its child process.

The supervisor keeps one child for each kind, at work or ready for the next job, and starts another
when it ends: with one missing for several checks in a row, jobs of that kind wait in vain. Redis is
not asked: the worker outlasts its absence, and restarting the worker would not bring it back.
"""

from __future__ import annotations

import sys
from pathlib import Path

KINDS = {"fine_tune", "ingest"}


def child_kinds() -> set[str]:
    """Return the kinds of the children that run in this container."""
    kinds = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it ended meanwhile
            continue
        if "training.child" in words:
            kinds.update(words)
    return kinds


sys.exit(not child_kinds() >= KINDS)
