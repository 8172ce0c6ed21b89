"""A real server for the tests that need Redis: Valkey, or what `$GRAFT_TEST_REDIS_URL` names.

`$GRAFT_TEST_REDIS_SERVER` is another program to start instead of Valkey, such as Debian's
`/usr/bin/redis-server`. Every test has a random key prefix, so tests share a server and may share
it with others.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.integration.redis_server import RedisServer


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
