"""`graft demo` and the life of `graft up`, for real: however they end, nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from cli.demo_data import EXAMPLES
from cli.stack import free_port
from tests.e2e.live_stack import LiveStack, start_stack, stop_stack
from tests.waiting import eventually

DEMO_SECONDS = 600


def processes_of(data: Path) -> list[int]:
    """Every process that was started for the stack in `data`, whoever its parent is.

    By its environment, by where it works and by what it was told: a server that gives itself a
    title, as Redis and Valkey do, writes it over the environment.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and belongs_to(process, data):
                found.append(process.pid)
    return found


def belongs_to(process: psutil.Process, data: Path) -> bool:
    """Tell whether a process has to do with `data`; what it does not let be read, does not."""

    def words() -> Iterator[str]:
        for read in (process.cwd, process.cmdline, process.environ):
            with suppress(psutil.AccessDenied):
                answer = read()
                if isinstance(answer, dict):
                    answer = answer.get("GRAFT_STORE_URL", "")
                yield from [answer] if isinstance(answer, str) else answer

    return any(Path(word).is_relative_to(data) for word in words() if word.startswith("/"))


def test_a_process_that_hides_its_environment_is_found(tmp_path: Path) -> None:
    sleep = (sys.executable, "-c", "import time; time.sleep(60)")
    by_folder = subprocess.Popen(sleep, cwd=tmp_path, env={})
    by_word = subprocess.Popen([*sleep, str(tmp_path / "data")], env={})
    try:
        assert sorted(processes_of(tmp_path)) == sorted([by_folder.pid, by_word.pid])
    finally:
        for process in (by_folder, by_word):
            process.kill()
            process.wait()
    assert processes_of(tmp_path) == []


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[LiveStack]:
    stack = start_stack(tmp_path)
    log = tmp_path / "up.log"
    eventually(lambda: "Graft is ready" in log.read_text(), 30, "`graft up` says it is ready")
    yield stack
    stack.http.close()
    stack.openai.close()
    with suppress(ProcessLookupError):
        stack.process.kill()
    stack.process.wait()


def test_the_demo_trains_serves_measures_and_leaves_nothing(tmp_path: Path) -> None:
    demo = subprocess.run(
        [sys.executable, "-m", "cli.main", "demo", "--data", str(tmp_path)],
        capture_output=True, text=True, timeout=DEMO_SECONDS, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert demo.returncode == 0, demo.stdout + demo.stderr
    reached = dict(re.findall(r"^(\S+)@1: accuracy (0\.\d+)", demo.stdout, re.MULTILINE))
    assert float(reached["support-intents"]) > 0.5
    assert float(reached["digits"]) > 0.85
    assert processes_of(tmp_path) == []


def test_ctrl_c_stops_all_and_a_second_up_finds_what_the_first_left(
    stack: LiveStack, tmp_path: Path
) -> None:
    rows = (EXAMPLES / "support-intents" / "train.csv").read_bytes().splitlines(keepends=True)
    file = stack.upload("train.csv", b"".join(rows[:101]))
    job = stack.finished(stack.train(file.id, "intents").id)
    assert job.status == "succeeded", job.error
    stack.served("intents")
    before = stack.predict("intents", ["where is my parcel?"])["predictions"]
    stop_stack(stack)
    assert processes_of(tmp_path) == []

    again = start_stack(tmp_path)
    try:
        assert again.job(job.id) == job
        assert [found.id for found in again.openai.files.list()] == [file.id]
        again.served("intents")
        assert again.predict("intents", ["where is my parcel?"])["predictions"] == before
    finally:
        stop_stack(again)
    assert (tmp_path / "d" / "logs" / "service.previous.log").stat().st_size > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ways_to_be_asked_to_stop(stack: LiveStack, number: int, tmp_path: Path) -> None:
    stack.process.send_signal(number)
    assert stack.process.wait(60) == 0
    assert processes_of(tmp_path) == []


def test_a_second_ctrl_c_does_not_wait(stack: LiveStack, tmp_path: Path) -> None:
    # A stopped process cannot answer a polite request: the first Ctrl-C alone would take its grace.
    (service, *_) = stack.pids("bentoml serve")
    os.kill(service, signal.SIGSTOP)
    began = time.monotonic()
    stack.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(60) == 0
    assert time.monotonic() - began < 8
    assert processes_of(tmp_path) == []


def test_even_kill_9_leaves_nothing(stack: LiveStack, tmp_path: Path) -> None:
    stack.process.kill()
    stack.process.wait()
    eventually(lambda: processes_of(tmp_path) == [], 20, "the guard has ended every process")


def test_a_directory_in_use_is_refused(stack: LiveStack, tmp_path: Path) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "cli.main", "up", "--data", str(stack.data),
         "--port", str(free_port())],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert second.returncode == 1
    assert "is in use by another `graft up`" in second.stderr
    assert stack.http.get("/readyz").is_success


def test_a_service_that_dies_comes_back(stack: LiveStack) -> None:
    (service, *_) = stack.pids("bentoml serve")
    os.kill(service, signal.SIGKILL)

    def is_back() -> bool:
        return stack.pids("bentoml serve") not in ([], [service])

    eventually(is_back, 30, "the supervisor starts the service again")
    eventually(lambda: ready(stack), 60, "the new service is ready")


def ready(stack: LiveStack) -> bool:
    with suppress(httpx.TransportError):
        return bool(stack.http.get("/readyz").is_success)
    return False
