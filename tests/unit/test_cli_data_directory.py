from __future__ import annotations

from pathlib import Path

import pytest

from cli.data_directory import LOCK, claim
from cli.failures import CommandError


def test_a_directory_serves_one_stack_at_a_time(tmp_path: Path) -> None:
    with claim(tmp_path / "data"):
        with pytest.raises(CommandError, match="in use by another `graft up`"):
            claim(tmp_path / "data")
        with pytest.raises(CommandError, match="in use by another `graft up`"):
            claim(tmp_path / "data", is_fresh=True)
    claim(tmp_path / "data").close()


def test_a_fresh_directory_keeps_nothing_of_the_last_run(tmp_path: Path) -> None:
    claim(tmp_path).close()
    (tmp_path / "store").mkdir()
    (tmp_path / "file").touch()
    claim(tmp_path).close()
    assert (tmp_path / "store").exists()
    claim(tmp_path, is_fresh=True).close()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_directory_of_someone_else_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for _ in range(2):
        with pytest.raises(CommandError, match="files of others"):
            claim(tmp_path, is_fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
