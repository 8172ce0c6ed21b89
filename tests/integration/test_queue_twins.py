"""Random sequences of commands leave Redis and the in-memory twin in the same state.

Time is kept out of it: a lease is either far from its end or over before the next command.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import GraftError
from core.jobs import Failure, Job, JobKind, JobStatus, NewJob, Progress
from core.queue import Claim, JobQueue
from core.queue.connection import connect
from core.queue.memory import MemoryJobQueue
from core.queue.redis import RedisJobQueue

LONG, SHORT = 600.0, 0.001
TENANTS = ("acme", "bolt")
IDS = ("a", "b", "c", "d")
ENDINGS = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
LIMITS: dict[str, Any] = {"max_queued": 3, "max_attempts": 2, "retention_seconds": 600}
BAD_DATA = Failure(code="data_error", message="line 3: no label")
CRASH = Failure(code="crashed", message="segmentation fault")

tenants, ids = st.sampled_from(TENANTS), st.sampled_from(IDS)
kinds = st.sampled_from((JobKind.FINE_TUNE, JobKind.FINE_TUNE, JobKind.INGEST))
priorities = st.integers(-1, 1)
any_claim = st.sampled_from((1, 1, 2, 3, 4))  # counted from the latest
claim = st.tuples(st.just("claim"), kinds, st.sampled_from(("w1", "w2")), st.booleans())
commands = st.one_of(
    st.tuples(st.just("enqueue"), tenants, ids, kinds, priorities, st.lists(ids, max_size=2)),
    claim,
    claim,
    claim,
    st.tuples(st.just("heartbeat"), any_claim),
    st.tuples(st.just("append_event"), any_claim),
    st.tuples(st.just("settle"), any_claim, st.sampled_from(ENDINGS)),
    st.tuples(st.just("retry"), any_claim, st.booleans()),
    st.tuples(st.just("cancel"), tenants, ids),
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
        if name == "cancel":
            return self._told(self.queue.cancel(*args))
        if not self.claims:
            return asyncio.sleep(0)
        claim = self.claims[-min(args[0], len(self.claims))]
        if name == "heartbeat":
            return self.queue.heartbeat(claim, LONG, Progress(stage="fit", fraction=0.5))
        if name == "append_event":
            return self._event(claim)
        if name == "retry":
            return self._retry(claim, args[1])
        error = BAD_DATA if args[1] is JobStatus.FAILED else None
        return self._told(self.queue.settle(claim, args[1], error=error))

    async def _enqueue(
        self, tenant: str, id: str, kind: JobKind, priority: int, after: list[str]
    ) -> object:
        new = NewJob(
            tenant=tenant, id=id, kind=kind, spec={"n": 1}, priority=priority, after=tuple(after)
        )
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
        return (await self.queue.append_event(claim, "step", "worked", data={"n": 1})).type

    async def _retry(self, claim: Claim, delayed: bool) -> object:
        told = await self._told(self.queue.retry(claim, SHORT if delayed else 0, CRASH))
        if delayed:
            await asyncio.sleep(5 * SHORT)
        return told

    async def _told(self, job: Awaitable[Job]) -> object:
        return timeless(await job)

    async def picture(self) -> object:
        """Return everything that a caller can see, without times."""
        shown: dict[str, object] = {}
        for tenant in TENANTS:
            for kind in JobKind:
                jobs = await self.queue.list(tenant, kind)
                shown[f"{tenant} {kind}"] = [timeless(job) for job in jobs]
                for job in jobs:
                    events = await self.queue.events(tenant, job.id)
                    shown[f"{tenant} {job.id}"] = (
                        await self.queue.position(job),
                        [(e.type, e.level, e.message, e.data) for e in events],
                    )
        return shown


def timeless(job: Job) -> dict[str, Any]:
    times = ("created_at", "started_at", "finished_at")
    fields = job.model_dump(exclude=set(times))
    return fields | {name: getattr(job, name) is not None for name in times}


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sequence=st.lists(commands, min_size=10, max_size=50))
def test_redis_and_memory_agree(redis_url: str, sequence: list[tuple[Any, ...]]) -> None:
    async def compare() -> None:
        client = connect(redis_url)
        memory = Side(MemoryJobQueue(**LIMITS))
        prefix = f"test-{secrets.token_hex(6)}"
        redis = Side(RedisJobQueue(client, prefix=prefix, **LIMITS))
        try:
            for command in sequence:
                assert await redis.run(*command) == await memory.run(*command), command
            assert await redis.picture() == await memory.picture()
        finally:
            await client.aclose()

    asyncio.run(compare())
