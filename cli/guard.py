"""Outlives `graft up` by a moment: whatever way that ends, nothing of its stack is left behind.

    python -m cli.guard <mark> <scratch directory>

Standard input is a pipe that only `graft up` holds open. When it closes, even by `kill -9`, the
guard ends every process with the mark and removes the scratch directory. It also inherits the lock
on the data directory, so that the next `graft up` waits for the last one's end.
"""

from __future__ import annotations

import shutil
import signal
import sys

from cli.marks import end_marked

GRACE_SECONDS = 5.0


def main() -> None:
    """Wait for the end of standard input, then clean up."""
    mark, scratch = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_marked(mark, GRACE_SECONDS)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
