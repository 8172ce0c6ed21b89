"""Random sequences of commands leave Redis and the in-memory twin in the same state.

Time is kept out of it: a lease is either far from its end or over before the next command.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import Any

import pytest

from core.changes import Change
from core.errors import GraftError
from core.jobs import Failure, Job, JobKind, JobStatus, NewJob, Once
from core.outlook import Progress
from core.queue import Claim, JobQueue
from core.queue.connection import connect
from core.queue.redis import RedisJobQueue
from tests.twins.memory import MemoryJobQueue

pytestmark = pytest.mark.anyio

LONG, SHORT = 600.0, 0.001
TENANTS = ("acme", "bolt")
KINDS = (JobKind.FINE_TUNE, JobKind.FINE_TUNE, JobKind.INGEST)
ENDINGS = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
LIMITS: dict[str, Any] = {
    "max_queued": 5,
    "max_attempts": 3,
    "retention_seconds": 600,
    "max_running": 2,
}
BAD_DATA = Failure(code="data_error", message="line 3: no label")
CRASH = Failure(code="crashed", message="segmentation fault")

SEEDS = range(12)
LENGTH = 250


def draw(seed: int) -> Iterator[tuple[Any, ...]]:
    """Yield commands, as (name, arguments…); a claim is given by its distance from the latest."""
    random = Random(seed)
    ids = ["j0"]
    weights = {
        "enqueue": 5, "claim": 6, "settle": 3, "retry": 2, "release": 1, "cancel": 1,
        "heartbeat": 1, "append_event": 1, "pause": 2, "resume": 2, "mark_publishing": 1,
        "clear_publishing": 1, "announce": 0.3,
    }  # fmt: skip
    for name in random.choices(list(weights), list(weights.values()), k=LENGTH):
        tenant, kind, recent = random.choice(TENANTS), random.choice(KINDS), ids[-6:]
        back = random.choice((1, 1, 1, 2, 3))
        if name == "enqueue":
            after = random.choices(recent, k=random.choice((0, 0, 1, 2)))
            if random.random() < 0.8:
                ids.append(f"j{len(ids)}")
            id = random.choice(ids[-2:])
            once = draw_once(random) if random.random() < 0.2 else None
            yield name, tenant, id, kind, random.randint(-1, 1), after, once
        elif name == "claim":
            yield name, kind, random.choice(("w1", "w2")), random.random() < 0.4
        elif name == "settle":
            yield name, back, random.choice(ENDINGS)
        elif name == "retry":
            yield name, back, random.random() < 0.5
        elif name in ("cancel", "pause", "resume"):
            yield name, tenant, random.choice(recent)
        else:
            yield name, back


def draw_once(random: Random) -> Once:
    """Return how a repeat is known; each request arrived before all that is remembered."""
    return Once(
        name=random.choice(("a", "b")), digest=random.choice("ddde"), seconds=600,
        is_repeat=random.random() < 0.5, age_seconds=LONG,
    )  # fmt: skip


@dataclass
class Side:
    """One queue and the claims made on it, in order."""

    queue: JobQueue
    claims: list[Claim] = field(default_factory=list)

    async def run(self, name: str, *args: Any) -> object:
        """Run a command; return what came of it, without the time of it."""
        try:
            return await self._command(name, *args)
        except GraftError as error:
            return type(error), error.message

    def _command(self, name: str, *args: Any) -> Awaitable[object]:
        if name == "enqueue":
            return self._enqueue(*args)
        if name == "claim":
            return self._claim(*args)
        if name in ("cancel", "pause", "resume"):
            return self._told(getattr(self.queue, name)(*args))
        if not self.claims:
            return asyncio.sleep(0)
        claim = self.claims[-min(args[0], len(self.claims))]
        if name == "heartbeat":
            return self.queue.heartbeat(claim, LONG, Progress(stage="fit", fraction=0.5))
        if name == "append_event":
            return self._event(claim)
        if name == "mark_publishing":
            return self.queue.mark_publishing(claim, LONG)
        if name == "clear_publishing":
            return self._told(self.queue.clear_publishing(claim))
        if name == "announce":
            change = Change(tenant=claim.job.tenant, model="m", type="published")
            return self.queue.announce(claim, change, {"n": 1})
        if name == "retry":
            return self._retry(claim, args[1])
        if name == "release":
            return self._told(self.queue.release(claim))
        error = BAD_DATA if args[1] is JobStatus.FAILED else None
        return self._told(self.queue.settle(claim, args[1], error=error))

    async def _enqueue(
        self,
        tenant: str,
        id: str,
        kind: JobKind,
        priority: int,
        after: list[str],
        once: Once | None,
    ) -> object:
        new = NewJob(
            tenant=tenant, id=id, kind=kind, spec={"n": 1}, priority=priority, after=tuple(after),
            once=once,
        )  # fmt: skip
        return await self._told(self.queue.enqueue(new))

    async def _claim(self, kind: JobKind, worker: str, dies: bool) -> object:
        claim = await self.queue.claim(kind, worker, SHORT if dies else LONG)
        if claim is None:
            return None
        self.claims.append(claim)
        if dies:
            await asyncio.sleep(5 * SHORT)
        return timeless(claim.job)

    async def _event(self, claim: Claim) -> str:
        return (await self.queue.append_event(claim, "checkpoint", "saved", data={"step": 7})).type

    async def _retry(self, claim: Claim, delayed: bool) -> object:
        told = await self._told(self.queue.retry(claim, SHORT if delayed else 0, CRASH))
        if delayed:
            await asyncio.sleep(5 * SHORT)
        return told

    async def _told(self, job: Awaitable[Job]) -> object:
        return timeless(await job)

    async def picture(self) -> list[tuple[object, list[tuple[Any, ...]]]]:
        """Return every job, as listed, with its position and its events, all without times."""
        shown = []
        for tenant, kind in product(TENANTS, JobKind):
            for job in await self.queue.list(tenant, kind, limit=LENGTH):
                place = timeless(job), await self.queue.position(job)
                events = await self.queue.events(tenant, job.id)
                shown.append((place, [(e.type, e.level, e.message, e.data) for e in events]))
        return shown


def timeless(job: Job) -> dict[str, Any]:
    times = ("created_at", "started_at", "finished_at", "claimed_at")
    fields = job.model_dump(exclude=set(times))
    return fields | {name: getattr(job, name) is not None for name in times}


@pytest.mark.parametrize("seed", SEEDS)
async def test_redis_and_memory_agree(redis_url: str, prefix: str, seed: int) -> None:
    client = connect(redis_url)
    memory = Side(MemoryJobQueue(**LIMITS))
    redis = Side(RedisJobQueue(client, prefix=prefix, **LIMITS))
    for number, command in enumerate(draw(seed)):
        told = await redis.run(*command)
        assert told == await memory.run(*command), (number, command)
    assert await redis.picture() == await memory.picture()
    await client.aclose()


async def test_the_sequences_reach_every_event() -> None:
    seen = set()
    for seed in SEEDS:
        side = Side(MemoryJobQueue(**LIMITS))
        for command in draw(seed):
            await side.run(*command)
        seen |= {event[0] for _, events in await side.picture() for event in events}
    assert seen >= {
        "validated", "queued", "started", "checkpoint", "retrying", "job_restarted",
        "cancel_requested", "pause_requested", "paused", "resumed", "succeeded", "failed",
        "cancelled",
    }  # fmt: skip
