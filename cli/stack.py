"""The local stack: Redis, the training worker and the service in one process tree.

    <data>/store        the artifact store
    <data>/redis        the append-only file of the private Redis
    <data>/logs         one bounded log per process, and the one before it
    <data>/graft.lock   held while a stack uses the directory

`GRAFT_REDIS_URL` and `GRAFT_STORE_URL` in the environment win over the first two. Processes are
started by module name with the running interpreter, so an editable install, a wheel and a plain
checkout behave alike from any working directory. Not here: restarting (cli.supervisor), the end of
it all when `graft` is killed (cli.guard).
"""

from __future__ import annotations

import os
import secrets
import shutil
import site
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx

import core
from cli import data_directory, embedded_redis
from cli.failures import CommandError
from cli.supervisor import Program, Supervisor

HOST = "127.0.0.1"
REDIS_SECONDS = 30.0
READY_SECONDS = 120.0
GUARD_SECONDS = 15.0
MAX_TEMP_PATH = 70
CODE_ROOT = Path(core.__file__).resolve().parent.parent


@dataclass(frozen=True)
class StackOptions:
    """What to run.

    `data` is the stack's directory, emptied first when `is_fresh`; `environment` is what the
    processes inherit.
    """

    data: Path
    port: int
    environment: Mapping[str, str]
    service_workers: int | None = None
    is_fresh: bool = False


class Stack:
    """A running local stack, as a context manager; leaving it stops every process.

    A second interrupt while it stops kills at once. Raises `CommandError` when the port or the
    directory is in use, or a process does not come up.
    """

    def __init__(self, options: StackOptions) -> None:
        self._data = options.data.resolve()
        self._options = options
        self._mark = secrets.token_hex(8)
        self._supervisor = Supervisor(self._mark)
        self._lock: IO[str] | None = None
        self._scratch: Path | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the service answers."""
        return f"http://{HOST}:{self._options.port}"

    def __enter__(self) -> Self:
        require_free_port(self._options.port)
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def check(self) -> None:
        """Raise `CommandError` when a process could not be kept running."""
        self._supervisor.check()

    def _start(self) -> None:
        self._lock = data_directory.claim(self._data, is_fresh=self._options.is_fresh)
        self._scratch = _make_scratch()
        environment = self._environment()
        self._guard = self._start_guard(environment)
        if "GRAFT_REDIS_URL" not in environment:
            environment["GRAFT_REDIS_URL"] = self._start_redis(environment)
        self._run("worker", ("-m", "training.worker"), environment)
        serve = ("serve", "service.app:Graft", "--host", HOST, "--port", str(self._options.port))
        self._run(
            "service", ("-m", "bentoml", *serve, "--working-dir", str(CODE_ROOT)), environment
        )
        self._wait_until_ready()
        self._supervisor.watch()

    def _run(self, name: str, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._supervisor.start(
            Program(name, (sys.executable, *arguments), dict(environment), self._log(name))
        )

    def _start_redis(self, environment: Mapping[str, str]) -> str:
        server = embedded_redis.find_server()
        if server is None:
            raise CommandError(
                "no Redis found: install Redis or Valkey 6.2+, or set GRAFT_REDIS_URL"
            )
        assert self._scratch is not None
        unix_socket = self._scratch / "redis.sock"
        directory = self._data / "redis"
        directory.mkdir(exist_ok=True)
        command = embedded_redis.command(server, directory, unix_socket)
        self._supervisor.start(Program("redis", command, dict(environment), self._log("redis")))
        if not embedded_redis.wait_until_answering(unix_socket, REDIS_SECONDS):
            self._supervisor.check()
            raise CommandError(f"Redis does not answer; its log is {self._log('redis')}")
        return f"unix://{unix_socket}"

    def _start_guard(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        assert self._lock is not None
        return subprocess.Popen(  # noqa: S603 - our own module
            (sys.executable, "-m", "cli.guard", f"{self._mark}/", str(self._scratch)),
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[self._lock.fileno()],
        )

    def _environment(self) -> dict[str, str]:
        environment = dict(self._options.environment)
        environment.setdefault("GRAFT_STORE_URL", str(self._data / "store"))
        environment.setdefault("BENTOML_HOME", str(self._scratch))
        environment["BENTOML_DO_NOT_TRACK"] = "True"
        # What a killed process leaves in its temporary directory goes with the scratch directory.
        environment["TMPDIR"] = str(self._scratch)
        environment["PYTHONUNBUFFERED"] = "1"
        # A folder named `service` in the working directory must not be taken for ours.
        environment["PYTHONSAFEPATH"] = "1"
        if str(CODE_ROOT) not in site.getsitepackages():
            paths = (str(CODE_ROOT), environment.get("PYTHONPATH"))
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        if self._options.service_workers is not None:
            environment["GRAFT_SERVICE_WORKERS"] = str(self._options.service_workers)
        return environment

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        with httpx.Client(base_url=self.url, timeout=5, trust_env=False) as http:
            while time.monotonic() < deadline:
                self._supervisor.check()
                with suppress(httpx.TransportError):
                    answer = http.get("/readyz")
                    if answer.is_success and answer.json().get("redis") == "connected":
                        return
                time.sleep(0.05)
        raise CommandError(
            f"the service or its Redis is not ready after {READY_SECONDS:g} s; "
            f"logs are in {self._data / 'logs'}"
        )

    def _log(self, name: str) -> Path:
        return self._data / "logs" / f"{name}.log"

    def _stop(self) -> None:
        try:
            self._supervisor.stop()
        except KeyboardInterrupt:
            self._supervisor.kill()
        finally:
            if self._guard is not None:
                assert self._guard.stdin is not None
                self._guard.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    self._guard.wait(GUARD_SECONDS)
            elif self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
            if self._lock is not None:
                self._lock.close()


def require_free_port(port: int) -> None:
    """Raise `CommandError` when something already listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise CommandError(
                f"port {port} cannot be used ({(error.strerror or 'in use').lower()}); "
                "choose another with --port"
            ) from error


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _make_scratch() -> Path:
    """Make a private directory whose path leaves room for the name of a Unix socket."""
    base = tempfile.gettempdir()
    short = base if len(base) <= MAX_TEMP_PATH else "/tmp"  # noqa: S108 - mkdtemp makes it private
    return Path(tempfile.mkdtemp(prefix="graft-", dir=short))
