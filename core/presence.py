"""Which processes live, and which of them serve a version: so that a job can tell who serves it.

A process *beats* under its role and is *live* until its beat runs out, by the server's clock. A
service process that was told of a new version *acknowledges* it once it has loaded or refused it.
All of it is a picture for people and forecasts; nothing is decided by it. Keys, below the queue's
root `<prefix>:{graft}`:

    presence:<role>                      sorted set: processes by the time their beat runs out, ms
    t:<tenant>:acks:<model>:<version>    hash: process → `1` if it serves the version, else `0`

Not here: hearing of versions (core.changes), and loading them (service.hot_loader).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Awaitable
from enum import StrEnum
from typing import Protocol, cast

from redis.asyncio import Redis

from core.errors import Unavailable
from core.queue.connection import translated

logger = logging.getLogger("graft")

BEAT_SECONDS = 2.0
LIVE_SECONDS = 3 * BEAT_SECONDS
ACKNOWLEDGED_SECONDS = 300

_BEAT = """
-- KEYS[1] a role's presence; ARGV[1] process, or '' to look only; ARGV[2] milliseconds, 0 to leave.
-- Answers the live processes. A removal comes first: a script that has written is not refused by
-- Redis that is full, and whoever lives then must not seem dead.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if tonumber(ARGV[2]) > 0 then
  redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
elseif ARGV[1] ~= '' then
  redis.call('ZREM', KEYS[1], ARGV[1])
end
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
if last then redis.call('PEXPIREAT', KEYS[1], last) end
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""


class Role(StrEnum):
    """What a process is: it answers requests, or it trains."""

    SERVICE = "service"
    WORKER = "worker"


class Presence(Protocol):
    """Every method may raise `Unavailable`."""

    async def beat(self, role: Role, process: str, seconds: float = LIVE_SECONDS) -> None:
        """Let a process be live for so long; 0 ends it now."""

    async def live(self, role: Role) -> set[str]:
        """Return the live processes of a role."""

    async def acknowledge(
        self, tenant: str, model: str, version: int, process: str, *, serves: bool
    ) -> None:
        """Note that a process serves a version, or has refused it; forgotten after minutes."""

    async def acknowledged(self, tenant: str, model: str, version: int) -> dict[str, bool]:
        """Return which processes have acknowledged a version, and whether they serve it."""


class RedisPresence(Presence):
    """The picture that all processes share."""

    def __init__(self, client: Redis, *, prefix: str) -> None:
        self._client = client
        self._root = f"{prefix}:{{graft}}"
        self._beat = client.register_script(_BEAT)

    async def beat(self, role: Role, process: str, seconds: float = LIVE_SECONDS) -> None:
        """Let a process be live for so long; 0 ends it now."""
        with translated():
            await self._beat(
                keys=[f"{self._root}:presence:{role}"], args=[process, round(seconds * 1000)]
            )

    async def live(self, role: Role) -> set[str]:
        """Return the live processes of a role."""
        with translated():
            found = await self._beat(keys=[f"{self._root}:presence:{role}"], args=["", 0])
        return set(cast("list[str]", found))

    async def acknowledge(
        self, tenant: str, model: str, version: int, process: str, *, serves: bool
    ) -> None:
        """Note that a process serves a version, or has refused it; forgotten after minutes."""
        key = self._acks(tenant, model, version)
        with translated():
            pipeline = self._client.pipeline(transaction=True)
            pipeline.hset(key, process, str(int(serves)))
            pipeline.expire(key, ACKNOWLEDGED_SECONDS)
            await pipeline.execute()

    async def acknowledged(self, tenant: str, model: str, version: int) -> dict[str, bool]:
        """Return which processes have acknowledged a version, and whether they serve it."""
        with translated():
            found = await cast(
                "Awaitable[dict[str, str]]",
                self._client.hgetall(self._acks(tenant, model, version)),
            )
        return {process: word == "1" for process, word in found.items()}

    def _acks(self, tenant: str, model: str, version: int) -> str:
        return f"{self._root}:t:{tenant}:acks:{model}:{version}"


def process_name() -> str:
    """A name that no other process has, for logs and leases."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


async def keep_presence(presence: Presence, role: Role, process: str) -> None:
    """Beat for a process until cancelled, then leave; while Redis is away, try again."""
    try:
        while True:
            try:
                await presence.beat(role, process)
            except Unavailable as error:
                logger.warning("presence: %s", error.message)
            await asyncio.sleep(BEAT_SECONDS)
    finally:
        try:
            async with asyncio.timeout(1):
                await presence.beat(role, process, 0)
        except (Unavailable, TimeoutError):
            pass  # it runs out by itself
