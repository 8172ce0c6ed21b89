from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli import marks


@pytest.mark.parametrize("deaf", [False, True])
def test_when_its_input_closes_all_marked_processes_and_the_scratch_are_gone(
    tmp_path: Path, deaf: bool
) -> None:
    mark = f"test-{secrets.token_hex(6)}"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "redis.sock").touch()
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if deaf else ""
    code = f"import signal, time; {ignore}print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen(
        (sys.executable, "-c", code),
        env=os.environ | {marks.VARIABLE: f"{mark}/child/"},
        stdout=subprocess.PIPE,
    )
    guard = subprocess.Popen(
        (sys.executable, "-c",
         "import cli.guard; cli.guard.GRACE_SECONDS = 0.2; print('up', flush=True); "
         "cli.guard.main()",
         f"{mark}/", str(scratch)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with child, guard:
        assert guard.stdin
        assert child.stdout
        assert guard.stdout
        child.stdout.readline()
        guard.stdout.readline()
        guard.stdin.close()
        assert guard.wait(20) == 0
        assert child.wait(1) == (-signal.SIGKILL if deaf else -signal.SIGTERM)
        assert not scratch.exists()


def test_a_mark_is_found_by_its_beginning_only(tmp_path: Path) -> None:
    for process, mark in ((10, b"a/worker/"), (11, b"a/service/"), (12, b"ab/worker/")):
        directory = tmp_path / str(process)
        directory.mkdir()
        (directory / "environ").write_bytes(b"PATH=/bin\0GRAFT_STACK=" + mark + b"\0X=1\0")
    (tmp_path / "13").mkdir()
    (tmp_path / "self").mkdir()
    assert sorted(marks._search_proc(b"GRAFT_STACK=a/", tmp_path)) == [10, 11]
    assert marks._search_proc(b"GRAFT_STACK=a/worker/", tmp_path) == [10]


def test_a_mark_is_found_in_a_listing_of_ps() -> None:
    lines = ["  10 python -m x PATH=/bin GRAFT_STACK=a/worker/ X=1", " 11 bash GRAFT_STACK=ab/x/"]
    assert marks._search_listing("GRAFT_STACK=a/", lines) == [10]
