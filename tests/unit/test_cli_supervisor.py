from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli import marks
from cli.failures import CommandError
from cli.supervisor import Program, Supervisor
from tests.waiting import eventually

MARK = f"test-{secrets.token_hex(6)}"
SLEEP = "import time; print('up', flush=True); time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
# Like BentoML's: a grandchild in a session of its own, out of reach of a process group.
PARENT = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
time.sleep(60)
"""


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor(MARK, restarts_per_minute=2, first_pause_seconds=0.01)
    yield supervisor
    supervisor.kill()
    assert marks.find_marked(MARK) == []


def program(directory: Path, code: str, *, name: str = "sleeper", grace: float = 5) -> Program:
    command = (sys.executable, "-c", code)
    return Program(name, command, dict(os.environ), directory / f"{name}.log", grace)


def test_stop_asks_first_and_in_reverse_order(supervisor: Supervisor, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    for name in ("first", "second"):
        code = (
            "import signal, sys, time\n"
            f"def end(*_): open({str(ended)!r}, 'a').write({name + ' '!r}); sys.exit()\n"
            "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(60)"
        )
        supervisor.start(program(tmp_path, code, name=name))
        eventually(lambda name=name: (tmp_path / f"{name}.log").read_text() == "up\n")
    supervisor.stop()
    assert ended.read_text() == "second first "


def test_what_does_not_stop_within_its_grace_is_killed(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    supervisor.start(program(tmp_path, DEAF, grace=0.1))
    eventually(lambda: (tmp_path / "sleeper.log").read_text() == "up\n")
    supervisor.stop()
    assert marks.find_marked(MARK) == []


def test_stop_reaches_grandchildren_in_other_sessions(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    supervisor.start(program(tmp_path, PARENT))
    eventually(lambda: len(marks.find_marked(MARK)) == 2)
    supervisor.stop()
    assert marks.find_marked(MARK) == []


def test_kill_waits_for_no_grace(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(program(tmp_path, DEAF, grace=60))
    eventually(lambda: (tmp_path / "sleeper.log").read_text() == "up\n")
    began = time.monotonic()
    supervisor.kill()
    assert time.monotonic() - began < 5


def test_what_dies_is_swept_and_started_again(supervisor: Supervisor, tmp_path: Path) -> None:
    first = supervisor.start(program(tmp_path, PARENT))
    eventually(lambda: len(marks.find_marked(MARK)) == 2)
    before = set(marks.find_marked(MARK))
    supervisor.watch()
    os.kill(first, signal.SIGKILL)
    eventually(lambda: len(set(marks.find_marked(MARK)) - before) == 2)
    assert not before & set(marks.find_marked(MARK))
    supervisor.check()


def test_what_dies_too_often_fails_the_stack_and_shows_its_log(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    supervisor.start(program(tmp_path, "print('no such luck'); raise SystemExit(3)"))
    supervisor.watch()
    eventually(lambda: supervisor.failure)
    with pytest.raises(CommandError, match=r"(?s)ended 3 times .* exit code 3.*sleeper\.log.*luck"):
        supervisor.check()


def test_a_watch_that_ends_fails_the_stack(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("cli.logs.trim", refuse)
    supervisor.start(program(tmp_path, SLEEP))
    supervisor.watch()
    eventually(lambda: supervisor.failure)
    with pytest.raises(CommandError, match="no longer be watched: not yours"):
        supervisor.check()


def test_before_the_watch_every_end_is_a_failure(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(program(tmp_path, "import os; os.kill(os.getpid(), 9)"))

    def has_failed() -> bool:
        try:
            supervisor.check()
        except CommandError as error:
            return "signal 9" in str(error)
        return False

    eventually(has_failed)


def test_a_command_that_does_not_exist_is_named(supervisor: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="the ghost could not be started"):
        supervisor.start(Program("ghost", ("/no/such",), {}, tmp_path / "ghost.log"))
