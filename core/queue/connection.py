"""How a process reaches Redis: bounded in connections and in time, with one error for all trouble.

`connect` makes a client whose every call ends within seconds. `translated` turns what Redis and
the network raise into `Unavailable`, whose message names no address and no secret. `StreamReader`
waits for entries of a stream. Commands are not sent twice: a lost answer may be that of a claim.

Not here: what a URL means (core.redis_address), where a primary is that may move
(core.queue.discovery), any key or script (core.queue.redis, core.changes).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from core.errors import Unavailable
from core.queue.discovery import (
    ASK_SECONDS,
    ClusterFinder,
    FoundConnection,
    FoundSSLConnection,
    SentinelFinder,
)
from core.redis_address import Credentials, RedisAddress, parse_redis_url

TIMEOUT_SECONDS = 5.0
MAX_CONNECTIONS = 64
HEALTH_CHECK_SECONDS = 30
BLOCK_SECONDS = 2.0
POLL_SECONDS = 0.25

Entry = tuple[str, dict[str, str]]

_ANSWERS = {
    "LOADING": "Redis is still loading its data.",
    "READONLY": "Redis is a replica and takes no writes now.",
    "MASTERDOWN": "Redis has lost its primary.",
    "CLUSTERDOWN": "The Redis cluster is down.",
    "TRYAGAIN": "The Redis cluster is moving keys.",
    "MOVED": "The Redis cluster has moved the keys.",
    "ASK": "The Redis cluster is moving keys.",
    "NOREPLICAS": "Redis has too few replicas to take writes.",
    "OOM": "Redis is out of memory.",
    "MISCONF": "Redis cannot save to its disk and takes no writes.",
    "UNBLOCKED": "Redis has changed its role.",
    "BUSY": "Redis is busy with a script.",
    "NOAUTH": "Redis refuses this process's credentials.",
    "NOPERM": "Redis refuses this process a command or a key.",
    "WRONGPASS": "Redis refuses this process's credentials.",
    "DENIED": "Redis refuses connections from other machines.",
}

_CLASSES = (
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.ClusterDownError, "CLUSTERDOWN"),
    (exceptions.TryAgainError, "TRYAGAIN"),
    (exceptions.MovedError, "MOVED"),
    (exceptions.AskError, "ASK"),
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.AuthenticationError, "NOAUTH"),
)


def connect(
    redis_url: str,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    max_connections: int = MAX_CONNECTIONS,
) -> Redis:
    """Return a client of what `core.redis_address` describes; it connects on first use.

    `timeout_seconds` bounds a connect, one answer, and the wait for a free connection, each. It
    must be longer than `BLOCK_SECONDS`, for which an answer may be held back on purpose. Raises
    `ValueError` for a URL that cannot be read.
    """
    if timeout_seconds <= BLOCK_SECONDS:
        raise ValueError(f"timeout_seconds must be more than {BLOCK_SECONDS}")
    address = parse_redis_url(redis_url)
    options = _tls(address) | {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "decode_responses": True,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
    }
    pool = BlockingConnectionPool(
        connection_class=_connection_class(address),
        max_connections=max_connections,
        timeout=timeout_seconds,
        health_check_interval=HEALTH_CHECK_SECONDS,
        db=address.db,
        **_login(address.credentials),
        **_whereabouts(address, options),
        **options,
    )
    return Redis.from_pool(pool)


def _connection_class(address: RedisAddress) -> type[AbstractConnection]:
    if address.kind == "socket":
        return UnixDomainSocketConnection
    if address.kind == "server":
        return SSLConnection if address.tls else Connection
    return FoundSSLConnection if address.tls else FoundConnection


def _whereabouts(address: RedisAddress, options: dict[str, Any]) -> dict[str, Any]:
    if address.kind == "socket":
        return {"path": address.path}
    if address.kind == "server":
        ((host, port),) = address.nodes
        return {"host": host, "port": port}
    # Those who only tell the way are not waited for as long as the server itself.
    asking = options | {"socket_timeout": ASK_SECONDS, "socket_connect_timeout": ASK_SECONDS}
    asking["ssl"] = address.tls is not None
    if address.kind == "sentinel":
        asking |= _login(address.sentinel_credentials)
        return {"finder": SentinelFinder(address.nodes, asking, address.service)}
    return {"finder": ClusterFinder(address.nodes, asking | _login(address.credentials))}


def _login(credentials: Credentials) -> dict[str, Any]:
    return {"username": credentials.username, "password": credentials.password}


def _tls(address: RedisAddress) -> dict[str, Any]:
    tls = address.tls
    if tls is None:
        return {}
    return {
        "ssl_ca_certs": tls.ca_certs,
        "ssl_certfile": tls.certfile,
        "ssl_keyfile": tls.keyfile,
        "ssl_check_hostname": tls.check_hostname,
    }


@contextmanager
def translated() -> Iterator[None]:
    """Raise `Unavailable` for every error that says Redis cannot serve now; let bugs through."""
    try:
        yield
    except (exceptions.RedisError, OSError) as error:
        message = _explain(error)
        if message is None:
            raise
        raise Unavailable(message) from error


def _explain(error: Exception) -> str | None:
    # What is refused while connecting comes inside a ConnectionError.
    errors = (error, error.__cause__, error.__context__)
    if any(isinstance(each, ssl.SSLError) for each in errors):
        return "Redis and this process do not agree on TLS, or do not trust each other."
    for error_class, word in _CLASSES:
        if any(isinstance(each, error_class) for each in errors):
            return _ANSWERS[word]
    # Some answers have no class, and Redis 6.2 wraps those to a script's commands in a sentence.
    words = set(str(error).replace("-", " ").split())
    for word, message in _ANSWERS.items():
        if word in words:
            return message
    if isinstance(error, (exceptions.TimeoutError, TimeoutError)):
        return "Redis did not answer in time."
    if isinstance(error, (exceptions.ConnectionError, OSError)):
        return "Redis cannot be reached."
    return None


class StreamReader:
    """Waits for entries of streams, holding at most half of the client's connections.

    Beyond that it looks again every `POLL_SECONDS`, so that many who wait for events cannot keep
    everyone else from Redis.
    """

    def __init__(self, client: Redis, *, max_blocked: int = MAX_CONNECTIONS // 2) -> None:
        self._client = client
        self._permits = asyncio.Semaphore(max_blocked)

    async def read(
        self, stream: str, cursor: str, timeout_seconds: float, *, count: int | None = None
    ) -> list[Entry]:
        """Return the entries behind the id `cursor`, waiting up to the timeout for the first.

        Raises `Unavailable`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while True:
            remaining = deadline - loop.time()
            if remaining <= 0:
                return await self._read(stream, cursor, count, None)
            if self._permits.locked():
                entries = await self._read(stream, cursor, count, None)
                if not entries:
                    await asyncio.sleep(min(remaining, POLL_SECONDS))
            else:
                async with self._permits:
                    block_ms = max(1, int(min(remaining, BLOCK_SECONDS) * 1000))
                    entries = await self._read(stream, cursor, count, block_ms)
            if entries:
                return entries

    async def _read(
        self, stream: str, cursor: str, count: int | None, block_ms: int | None
    ) -> list[Entry]:
        with translated():
            reply = cast(
                list[tuple[str, list[Entry]]],
                await self._client.xread({stream: cursor}, count=count, block=block_ms),
            )
        return reply[0][1] if reply else []
