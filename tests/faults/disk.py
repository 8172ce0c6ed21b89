"""A small disk of a test's own, to fill up."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.faults import fill_disk

DISK_BYTES = 16 << 20


class Disk:
    """A mounted file system of 16 MB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no room."""
        fill_disk(self.ballast)
        with pytest.raises(OSError, match="No space left"):
            (self.folder / "probe").write_bytes(bytes(8192))
        (self.folder / "probe").unlink()

    def free(self) -> None:
        """Make room again."""
        self.ballast.unlink(missing_ok=True)


@contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """Mount a disk at a folder; only root may, and in CI somebody must."""
    if os.geteuid() and not os.environ.get("CI"):
        pytest.skip("only root may mount a small disk to fill up")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "graft-test", str(folder)]
    subprocess.run(command, check=True, timeout=10)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)
