"""What only the Redis queue promises: its keys, its memory, and how it meets trouble."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis import exceptions
from redis.asyncio import Redis

from core.changes import Change, RedisChangeFeed
from core.errors import Unavailable
from core.jobs import Failure, JobKind, JobStatus, NewJob
from core.outlook import Estimate, Progress
from core.presence import RedisPresence, Role
from core.queue import Claim
from core.queue.connection import BLOCK_SECONDS, MAX_CONNECTIONS, connect, translated
from core.queue.redis import RedisJobQueue

if TYPE_CHECKING:
    from tests.integration.redis_server import RedisServer

pytestmark = pytest.mark.anyio

LONG = 60.0
PROMPT = 1.0
TUNE = JobKind.FINE_TUNE
CRASH = Failure(code="crashed", message="segmentation fault")
SPEC: dict[str, Any] = {
    "model": "minilm", "training_file": "file-0123456789abcdef01234567", "suffix": "intents",
    "seed": 7, "method": {"type": "supervised"}, "strategy": "feature_extraction",
    "precision": "fp32", "max_seconds": 3600, "promote": True, "priority": 0,
}  # fmt: skip


def queue_on(client: Redis, prefix: str, **limits: int) -> RedisJobQueue:
    defaults = {"max_queued": 1_000, "max_attempts": 3, "retention_seconds": 600}
    return RedisJobQueue(client, prefix=prefix, **{**defaults, **limits})


def new_job(id: str, **fields: Any) -> NewJob:
    return NewJob(**{"tenant": "acme", "id": id, "kind": TUNE, "spec": SPEC, **fields})


async def claimed(queue: RedisJobQueue) -> Claim:
    claim = await queue.claim(TUNE, "w", LONG)
    assert claim is not None
    return claim


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def own_client(own_server: RedisServer) -> AsyncIterator[Redis]:
    client = connect(own_server.url)
    yield client
    await client.aclose()


class TestScripts:
    def test_every_file_is_used_and_says_what_it_takes(self) -> None:
        folder = Path(str(files("core.queue"))) / "lua"
        source = "".join(path.read_text() for path in folder.parent.glob("redis*.py"))
        used = set(re.findall(r'_(?:run|run_fenced|ask)\(\s*"(\w+)"', source))
        assert {path.stem for path in folder.glob("*.lua")} == {*used, "job"}
        for path in folder.glob("*.lua"):
            header, code = re.match(r"((?:--.*\n)+)(.*)", path.read_text(), re.S).groups()  # type: ignore[union-attr]
            taken = {int(n) for n in re.findall(r"ARGV\[(\d+)\]", code)}
            told = {int(n) for n in re.findall(r"ARGV\[(\d+)…?\]", header)}
            assert taken <= told, path.name
            assert "KEYS[1]" in header, path.name

    async def test_scripts_come_back_after_the_server_forgot_them(
        self, own_client: Redis, prefix: str
    ) -> None:
        queue = queue_on(own_client, prefix)
        await queue.enqueue(new_job("a"))
        await own_client.script_flush()
        await queue.enqueue(new_job("b"))
        assert (await claimed(queue)).job.id == "a"


class TestKeys:
    async def test_keys_share_a_hash_tag_and_name_the_tenant(
        self, client: Redis, prefix: str
    ) -> None:
        queue, root = queue_on(client, prefix), f"{prefix}:{{graft}}"
        await queue.enqueue(new_job("a"))
        await claimed(queue)
        await queue.enqueue(new_job("b"))
        await queue.retry(await claimed(queue), LONG, CRASH)
        await queue.enqueue(new_job("c"))
        await queue.enqueue(new_job("d", after=("c",)))
        await RedisChangeFeed(client, prefix=prefix).publish(
            Change(tenant="acme", model="m", type="released")
        )
        keys = {key async for key in client.scan_iter(f"{prefix}*")}
        found = {key: await client.type(key) for key in keys}
        events = {f"{root}:t:acme:events:{id}": "stream" for id in "abc"}
        jobs = {f"{root}:t:acme:job:{id}": "hash" for id in "abcd"}
        assert found == events | jobs | {
            f"{root}:t:acme:waiters:c": "set",
            f"{root}:t:acme:pending:fine_tune": "zset",
            f"{root}:t:acme:open:fine_tune": "set",
            f"{root}:t:acme:running:fine_tune": "set",
            f"{root}:t:acme:jobs:fine_tune": "zset",
            f"{root}:t:acme:seq:fine_tune": "string",
            f"{root}:tenants:fine_tune": "zset",
            f"{root}:delayed:fine_tune": "zset",
            f"{root}:leases:fine_tune": "zset",
            f"{root}:wake:fine_tune": "stream",
            f"{root}:changes": "stream",
        }

    async def test_finished_jobs_leave_only_what_expires(self, client: Redis, prefix: str) -> None:
        queue, root = queue_on(client, prefix), f"{prefix}:{{graft}}"
        await queue.enqueue(new_job("a", estimate=Estimate(pace="minilm", stages={"fit": 1})))
        await queue.enqueue(new_job("b", after=("a",)))
        for _ in "ab":
            await queue.settle(await claimed(queue), JobStatus.SUCCEEDED, seconds=2)
        assert await client.ttl(f"{root}:t:acme:job:a") == -1
        assert await client.type(f"{root}:unarchived") == "zset"
        for job in await queue.unarchived():
            await queue.mark_archived(job)
        keys = {key async for key in client.scan_iter(f"{prefix}*")}
        lasting = {key.removeprefix(root) for key in keys if await client.ttl(key) == -1}
        assert lasting == {
            ":t:acme:jobs:fine_tune",
            ":t:acme:seq:fine_tune",
            ":wake:fine_tune",
            ":speeds:fine_tune",
        }
        assert await client.ttl(f"{root}:t:acme:job:a") > 590
        assert await client.ttl(f"{root}:t:acme:events:a") > 590

    async def test_evicted_record_leaves_the_unarchived(self, client: Redis, prefix: str) -> None:
        queue, root = queue_on(client, prefix), f"{prefix}:{{graft}}"
        await queue.enqueue(new_job("a"))
        await queue.cancel("acme", "a")
        await client.delete(f"{root}:t:acme:job:a")
        assert await queue.unarchived() == []
        assert await client.exists(f"{root}:unarchived") == 0

    async def test_enqueue_trims_the_index_of_expired_jobs(
        self, client: Redis, prefix: str
    ) -> None:
        queue, root = queue_on(client, prefix), f"{prefix}:{{graft}}:t:acme"
        for n in range(4):
            await queue.enqueue(new_job(f"j{n}"))
            await client.delete(f"{root}:job:j{n}")
        assert await client.zrange(f"{root}:jobs:fine_tune", 0, -1) == ["j3"]
        assert await queue.claim(TUNE, "w", LONG) is None

    async def test_queued_job_takes_little_memory(self, own_client: Redis, prefix: str) -> None:
        queue = queue_on(own_client, prefix)
        await queue.enqueue(new_job("first"))
        before = (await own_client.info("memory"))["used_memory"]
        for n in range(300):
            await queue.enqueue(new_job(f"ftjob-0123456789abcdef{n:08}"))
        after = (await own_client.info("memory"))["used_memory"]
        assert (after - before) / 300 < 4_000


class TestWaiting:
    async def test_processes_wake_each_other(
        self, client: Redis, redis_url: str, prefix: str
    ) -> None:
        other_client = connect(redis_url)
        worker, service = queue_on(client, prefix), queue_on(other_client, prefix)
        assert await worker.claim(TUNE, "w", LONG) is None
        waiting = asyncio.create_task(worker.wait(TUNE, LONG))
        await worker.wait(TUNE, 0.02)
        await service.enqueue(new_job("j"))
        await asyncio.wait_for(waiting, PROMPT)
        await service.close()

    async def test_waits_longer_than_one_command_may_block(
        self, client: Redis, prefix: str
    ) -> None:
        started = time.monotonic()
        await queue_on(client, prefix).wait(TUNE, BLOCK_SECONDS + 0.1)
        assert BLOCK_SECONDS < time.monotonic() - started < BLOCK_SECONDS + PROMPT

    async def test_many_who_wait_in_vain_hold_up_nobody(self, client: Redis, prefix: str) -> None:
        queue = queue_on(client, prefix)
        await queue.enqueue(new_job("quiet", tenant="bolt"))
        await queue.enqueue(new_job("j"))
        waiting = [
            asyncio.create_task(queue.wait_events(tenant, id, event.id, LONG))
            for tenant, id, copies in (("bolt", "quiet", 2 * MAX_CONNECTIONS), ("acme", "j", 2))
            for event in await queue.events(tenant, id)
            for _ in range(copies)
        ]
        await asyncio.wait_for(queue.wait_events("acme", "gone", None, 0.05), PROMPT)
        await asyncio.wait_for(queue.ping(), PROMPT)
        await queue.cancel("acme", "j")
        for (event,) in await asyncio.wait_for(asyncio.gather(*waiting[-2:]), PROMPT):
            assert event.type == "cancelled"
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.wait_for(queue.ping(), PROMPT)

    async def test_follower_steps_over_what_it_does_not_know(
        self, client: Redis, prefix: str
    ) -> None:
        feed = RedisChangeFeed(client, prefix=prefix)
        cursor, _ = await feed.follow(None, 0)
        stream = f"{prefix}:{{graft}}:changes"
        await client.xadd(stream, {"change": '{"type": "merged", "tenant": "t", "model": "m"}'})
        await client.xadd(stream, {"other": "1"})
        known = Change(tenant="acme", model="m", type="deleted")
        await feed.publish(known)
        end, changes = await feed.follow(cursor, PROMPT)
        assert changes == [known]
        assert end != cursor


class TestTrouble:
    @pytest.mark.parametrize("url", ["unix:///tmp/no-such-graft.sock", "redis://:pw@127.0.0.1:1/0"])
    async def test_absent_server_is_unavailable_at_once(self, url: str, prefix: str) -> None:
        queue = queue_on(connect(url), prefix)
        feed = RedisChangeFeed(connect(url), prefix=prefix)
        started = time.monotonic()
        calls: list[Awaitable[object]] = [
            queue.ping(), queue.enqueue(new_job("j")), queue.get("acme", "j"),
            queue.events("acme", "j"), queue.wait(TUNE, LONG), queue.claim(TUNE, "w", LONG),
            queue.wait_events("acme", "j", None, LONG), queue.list("acme", TUNE),
            feed.follow(None, 0), feed.follow("0-0", LONG),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(Unavailable) as trouble:
                await call
            assert trouble.value.message == "Redis cannot be reached."
        assert time.monotonic() - started < PROMPT

    async def test_silent_server_is_unavailable_in_bounded_time(
        self, own_server: RedisServer, prefix: str
    ) -> None:
        client = connect(own_server.url, timeout_seconds=BLOCK_SECONDS + 0.1)
        queue = queue_on(client, prefix)
        await queue.enqueue(new_job("j"))
        own_server.signal(signal.SIGSTOP)
        started = time.monotonic()
        calls = [queue.claim(TUNE, "w", LONG), queue.wait(TUNE, LONG), queue.ping()]
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(answer, Unavailable)
        assert time.monotonic() - started < BLOCK_SECONDS + 2 * PROMPT
        own_server.signal(signal.SIGCONT)
        await queue.ping()
        await client.aclose()

    async def test_lease_outlives_a_restart_of_the_server(
        self, own_server: RedisServer, own_client: Redis, prefix: str
    ) -> None:
        queue = queue_on(own_client, prefix)
        await queue.enqueue(new_job("a"))
        await queue.enqueue(new_job("b", after=("a",)))
        claim = await claimed(queue)
        assert await queue.claim(TUNE, "w", LONG) is None
        waiting = asyncio.create_task(queue.wait(TUNE, LONG))
        await queue.wait(TUNE, 0.02)
        own_server.kill()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(waiting, PROMPT)
        with pytest.raises(Unavailable):
            await queue.heartbeat(claim, LONG)
        own_server.start()
        assert await queue.heartbeat(claim, LONG) is None
        await queue.settle(claim, JobStatus.SUCCEEDED)
        assert (await claimed(queue)).job.id == "b"
        types = [event.type for event in await queue.events("acme", "a")]
        assert types == ["queued", "started", "succeeded"]

    async def test_full_server_takes_no_new_work_and_lets_the_old_end(
        self, own_client: Redis, prefix: str
    ) -> None:
        queue, presence = queue_on(own_client, prefix), RedisPresence(own_client, prefix=prefix)
        for name in ("tuned", "retried", "released", "expired", "waits"):
            estimate = Estimate(pace="minilm", stages={"fit": 1})
            await queue.enqueue(new_job(name, estimate=estimate))
        tuned, retried, released = [await claimed(queue) for _ in range(3)]
        await queue.claim(TUNE, "dead", 0.001)
        # One that was evicted, which the next `enqueue` takes from the index.
        await own_client.zadd(f"{prefix}:{{graft}}:t:acme:jobs:fine_tune", {"evicted": -1})
        await own_client.config_set("maxmemory", "1")

        for refused in (queue.enqueue(new_job("new")), queue.claim(TUNE, "w", LONG)):
            with pytest.raises(Unavailable, match="out of memory"):
                await refused
        found = [await queue.get("acme", name) for name in ("expired", "waits", "new")]
        assert [(job.status, job.attempt) for job in found if job] == [
            (JobStatus.RUNNING, 1), (JobStatus.QUEUED, 0),
        ]  # fmt: skip

        await presence.beat(Role.WORKER, "w")
        assert await presence.live(Role.WORKER) == {"w"}
        await queue.heartbeat(tuned, LONG, Progress(stage="fit", fraction=0.5))
        await queue.append_event(tuned, "epoch_ended", "One.", data={"step": 1})
        assert await queue.mark_publishing(tuned, LONG) is None
        await queue.announce(tuned, Change(tenant="acme", model="m", type="published"), {"a": 1})
        assert (await queue.settle(tuned, JobStatus.SUCCEEDED, seconds=2)).status == "succeeded"
        assert (await queue.retry(retried, 0, CRASH)).status is JobStatus.QUEUED
        assert (await queue.release(released)).status is JobStatus.QUEUED
        assert (await queue.cancel("acme", "waits")).status is JobStatus.CANCELLED
        with pytest.raises(Unavailable, match="out of memory"):
            await queue.claim(TUNE, "w", LONG)

        await own_client.config_set("maxmemory", "0")
        assert [(await claimed(queue)).job.id for _ in range(3)] == [
            "retried", "released", "expired",
        ]  # fmt: skip

    async def test_replica_takes_no_writes(self, own_client: Redis, prefix: str) -> None:
        await own_client.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(Unavailable, match="replica"):
            await queue_on(own_client, prefix).enqueue(new_job("j"))

    async def test_wrong_password(
        self, own_server: RedisServer, own_client: Redis, prefix: str
    ) -> None:
        await own_client.config_set("requirepass", "right")
        for url in (own_server.url, own_server.url + "?password=wrong"):
            client = connect(url)
            with pytest.raises(Unavailable, match="credentials"):
                await queue_on(client, prefix).ping()
            await client.aclose()

    @pytest.mark.parametrize(
        "error",
        [
            exceptions.ResponseError("MISCONF Redis is configured to save RDB snapshots, but …"),
            exceptions.ResponseError("NOREPLICAS Not enough good replicas to write."),
            exceptions.ResponseError("BUSY Redis is busy running a script."),
            exceptions.ResponseError(
                "Error running script (call to f_0): @user_script:5: @user_script: 5: "
                "-OOM command not allowed when used memory > 'maxmemory'."
            ),
            exceptions.BusyLoadingError("Redis is loading the dataset in memory"),
            exceptions.TimeoutError("Timeout reading from /secret/path"),
            ConnectionResetError("reset by 10.0.0.1"),
        ],
    )
    def test_trouble_is_told_without_addresses(self, error: Exception) -> None:
        with pytest.raises(Unavailable) as trouble, translated():
            raise error
        assert not re.search(r"[/@]|\d\.\d", trouble.value.message)

    async def test_mistake_of_ours_is_not_called_trouble(self, client: Redis, prefix: str) -> None:
        await client.set(f"{prefix}:{{graft}}:t:acme:job:j", "not a hash", ex=60)
        with pytest.raises(exceptions.ResponseError, match="wrong kind"):
            await queue_on(client, prefix).get("acme", "j")

    def test_timeout_must_be_longer_than_a_block(self) -> None:
        with pytest.raises(ValueError, match="timeout_seconds"):
            connect("redis://127.0.0.1", timeout_seconds=BLOCK_SECONDS)
