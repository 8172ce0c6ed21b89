"""Keeps a few programs running: starts them in order, restarts what dies, stops them in reverse.

Each program leads a session of its own, so that Ctrl-C reaches `graft` alone, and writes to one
bounded log. A program that ends is swept (all that it left behind is killed) and started again
after a growing pause; one that ends too often within a minute makes the whole stack fail.
Not here: which programs there are (cli.stack), what happens if `graft` itself dies (cli.guard).
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cli import logs, marks
from cli.failures import CommandError

TICK_SECONDS = 0.1
RESTARTS_PER_MINUTE = 5
FIRST_PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class Program:
    """A command to keep running; `grace_seconds` is how long it may take to stop."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path
    grace_seconds: float = 10


@dataclass
class _Running:
    program: Program
    process: subprocess.Popen[bytes]
    ended: deque[float] = field(default_factory=deque)
    restart_at: float | None = None


class Supervisor:
    """Runs programs under one mark. Use from one thread; `watch` adds a thread of its own."""

    def __init__(
        self,
        mark: str,
        *,
        restarts_per_minute: int = RESTARTS_PER_MINUTE,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self._mark = mark
        self._restarts_per_minute = restarts_per_minute
        self._first_pause_seconds = first_pause_seconds
        self._running: list[_Running] = []
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self.failure: str | None = None

    def start(self, program: Program) -> int:
        """Start a program with a fresh log and return its process id."""
        logs.begin(program.log)
        process = self._spawn(program)
        self._running.append(_Running(program, process))
        return process.pid

    def check(self) -> None:
        """Raise `CommandError` when the stack failed, or a program not yet watched has ended."""
        if self._watcher is None and self.failure is None:
            for running in self._running:
                code = running.process.poll()
                if code is not None:
                    self.failure = _obituary(running.program, f"ended with {_how(code)}")
                    break
        if self.failure is not None:
            raise CommandError(self.failure)

    def watch(self) -> None:
        """From now on restart what ends and keep the logs bounded."""
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Stop all programs, last started first, each within its grace."""
        self._end_watch()
        for running in reversed(self._running):
            if running.process.poll() is None:
                running.process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    running.process.wait(running.program.grace_seconds)
            self._sweep(running)
        self._running.clear()

    def kill(self) -> None:
        """End all programs at once, without grace."""
        self._end_watch()
        marks.end_marked(f"{self._mark}/", grace_seconds=0)
        for running in self._running:
            running.process.kill()
            running.process.wait()
        self._running.clear()

    def _end_watch(self) -> None:
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self) -> None:
        try:
            while not self._stopping.wait(TICK_SECONDS) and self.failure is None:
                for running in self._running:
                    logs.trim(running.program.log)
                    self._tend(running)
        except OSError as error:
            # A stack that nobody watches must not look as if it were.
            self.failure = f"the programs can no longer be watched: {error}"

    def _tend(self, running: _Running) -> None:
        now = time.monotonic()
        if running.restart_at is not None:
            if now >= running.restart_at:
                running.restart_at = None
                try:
                    running.process = self._spawn(running.program)
                except CommandError as error:
                    self.failure = str(error)
            return
        code = running.process.poll()
        if code is None:
            return
        self._sweep(running)
        running.ended.append(now)
        while running.ended[0] < now - 60:
            running.ended.popleft()
        times = len(running.ended)
        if times > self._restarts_per_minute:
            self.failure = _obituary(
                running.program, f"ended {times} times within a minute, last with {_how(code)}"
            )
        else:
            running.restart_at = now + min(10, self._first_pause_seconds * 2 ** (times - 1))

    def _spawn(self, program: Program) -> subprocess.Popen[bytes]:
        environment = {**program.environment, marks.VARIABLE: self._mark_of(program)}
        try:
            with program.log.open("ab") as log:
                return subprocess.Popen(  # noqa: S603 - our own programs, never a shell
                    program.command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise CommandError(f"the {program.name} could not be started: {error}") from error

    def _sweep(self, running: _Running) -> None:
        marks.end_marked(self._mark_of(running.program), grace_seconds=0)
        running.process.wait()

    def _mark_of(self, program: Program) -> str:
        # The closing slash keeps one name from being the beginning of another.
        return f"{self._mark}/{program.name}/"


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _obituary(program: Program, what: str) -> str:
    end = logs.last_lines(program.log)
    return f"the {program.name} {what}; its log is {program.log}" + (f":\n{end}" if end else "")
