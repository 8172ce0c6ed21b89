"""Which processes live, and which of them have acknowledged a version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from core.presence import RedisPresence, Role, keep_presence
from core.queue.connection import connect

pytestmark = pytest.mark.anyio
SHORT = 0.1


@pytest.fixture
async def presence(redis_url: str, prefix: str) -> AsyncIterator[RedisPresence]:
    client = connect(redis_url)
    yield RedisPresence(client, prefix=prefix)
    await client.aclose()


async def becomes(presence: RedisPresence, role: Role, live: set[str]) -> None:
    async with asyncio.timeout(10):
        while await presence.live(role) != live:
            await asyncio.sleep(0.01)


async def test_process_lives_until_its_beat_runs_out(presence: RedisPresence) -> None:
    await presence.beat(Role.SERVICE, "a", 600)
    await presence.beat(Role.SERVICE, "b", SHORT)
    await presence.beat(Role.WORKER, "c", 600)
    await becomes(presence, Role.SERVICE, {"a"})
    assert await presence.live(Role.WORKER) == {"c"}
    await presence.beat(Role.SERVICE, "b", 600)
    # A short beat of one must not end another's: they share a key.
    await presence.beat(Role.SERVICE, "c", SHORT)
    await becomes(presence, Role.SERVICE, {"a", "b"})


async def test_process_that_ends_leaves_at_once(presence: RedisPresence) -> None:
    await presence.beat(Role.WORKER, "other", 600)
    keeping = asyncio.create_task(keep_presence(presence, Role.WORKER, "me"))
    await becomes(presence, Role.WORKER, {"me", "other"})
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert await presence.live(Role.WORKER) == {"other"}


async def test_acknowledgements_belong_to_one_version(presence: RedisPresence) -> None:
    await presence.acknowledge("acme", "m", 1, "a", serves=True)
    await presence.acknowledge("acme", "m", 1, "b", serves=False)
    assert await presence.acknowledged("acme", "m", 1) == {"a": True, "b": False}
    for tenant, model, version in (("bolt", "m", 1), ("acme", "n", 1), ("acme", "m", 2)):
        assert await presence.acknowledged(tenant, model, version) == {}
