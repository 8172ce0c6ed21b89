"""The scratch disk: where a job keeps, in files without a name, what it need not keep in memory.

It is where Python puts temporary files (`TMPDIR`). The files have no name, so nothing is left of
them whatever ends the process. Not here: what must last (core.store).
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import NoSpace


def free_bytes() -> int:
    """Return how much there is room for."""
    return shutil.disk_usage(tempfile.gettempdir()).free


@contextmanager
def full_disk_errors() -> Iterator[None]:
    """Turn a full scratch disk into `NoSpace`; the store does so for itself."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("the scratch disk has no room left") from error
        raise
