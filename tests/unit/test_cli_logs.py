from __future__ import annotations

from pathlib import Path

from cli import logs


def test_a_new_run_keeps_the_log_of_the_last(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "worker.log"
    logs.begin(path)
    path.write_text("first run")
    logs.begin(path)
    assert path.read_text() == ""
    assert logs.previous(path).name == "worker.previous.log"
    assert logs.previous(path).read_text() == "first run"


def test_a_log_that_grew_is_cut_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    with path.open("a") as log:
        log.write("x" * 100)
        log.flush()
        logs.trim(path, max_bytes=200)
        assert path.stat().st_size == 100
        logs.trim(path, max_bytes=50)
        log.write("after")
    assert path.read_text() == "after"
    assert logs.previous(path).read_text() == "x" * 100


def test_a_log_is_cut_even_where_it_cannot_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    path.write_text("x" * 100)
    logs.previous(path).mkdir()
    logs.trim(path, max_bytes=50)
    assert path.read_text() == ""
    path.unlink()
    logs.trim(path, max_bytes=50)


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "worker.log"
    assert logs.last_lines(path) == ""
    path.write_text("".join(f"line {n}\n" for n in range(100_000)))
    assert logs.last_lines(path, 2) == "line 99998\nline 99999"
