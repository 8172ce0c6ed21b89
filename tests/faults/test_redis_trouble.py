"""Redis dies, comes back, or answers that it cannot serve: workers live on and no job is lost."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis

from core.errors import Unavailable
from core.queue.connection import translated
from tests.faults.rig import LEASE_SECONDS, Rig
from tests.waiting import eventually

AWAY_SECONDS = 1.7 * LEASE_SECONDS


@pytest.mark.parametrize("without", [(), ("patience",)], ids=["guarded", "unguarded"])
def test_redis_killed_and_back_within_a_lease(rig: Rig, without: tuple[str, ...]) -> None:
    """The worker is patient, and its attempt goes on."""
    rig.start(lease=10, without=without)
    job_id = rig.enqueue("steady", "pause@fit")
    behind = [rig.enqueue("behind") for _ in range(3)]
    rig.struck(job_id)
    rig.server.kill()
    time.sleep(0.5)
    rig.server.start()
    if without:
        # The attempt is given up, and its job waits for the end of the lease.
        rig.ended(behind[-1])
        assert rig.job(job_id).status == "running"
        return
    rig.finish(30)
    for each in (job_id, *behind):
        assert (rig.job(each).status, rig.job(each).attempt) == ("succeeded", 1)
    rig.check()


def replica(server: redis.Redis) -> Callable[[], object]:
    server.replicaof("127.0.0.1", "1")
    return lambda: server.replicaof("NO", "ONE")


def cannot_save(server: redis.Redis) -> Callable[[], object]:
    server.config_set("save", "3600 1000000")  # it takes no writes only if it is to save
    server.bgsave()
    while server.info("persistence")["rdb_bgsave_in_progress"]:
        time.sleep(0.01)
    assert server.info("persistence")["rdb_last_bgsave_status"] == "err"
    return lambda: server.config_set("save", "")


@pytest.mark.parametrize(
    ("trouble", "why"),
    [(replica, "is a replica"), (cannot_save, "cannot save")],
    ids=["readonly", "misconf"],
)
def test_redis_refuses_writes(
    rig: Rig, trouble: Callable[[redis.Redis], Callable[[], object]], why: str
) -> None:
    worker = rig.start()
    job_id = rig.enqueue("refused", "pause@fit")
    behind = rig.enqueue("behind")
    rig.struck(job_id)
    (rig.server.folder / "dump.rdb").mkdir()  # so that a dump cannot be put there
    with redis.Redis.from_url(rig.url) as server:
        mend = trouble(server)
        with pytest.raises(Unavailable, match=why), translated():
            server.execute_command("XADD", "probe", "*", "a", "b")
        time.sleep(AWAY_SECONDS)
        mend()
    rig.finish(30)
    assert worker.poll() is None
    for each in (job_id, behind):
        assert rig.job(each).status == "succeeded", rig.job(each).error
    rig.check()


def test_redis_is_full(rig: Rig) -> None:
    """What runs goes on and ends, in one attempt; what waits goes on waiting, and loses none."""
    worker = rig.start()
    job_id = rig.enqueue("running", "pause@fit")
    behind = rig.enqueue("behind")
    rig.struck(job_id)
    with redis.Redis.from_url(rig.url) as server:
        server.config_set("maxmemory", "1")
        rig.ended(job_id)
        with pytest.raises(Unavailable, match="out of memory"):
            rig.enqueue("refused")
        time.sleep(LEASE_SECONDS)
        assert (rig.job(behind).status, rig.job(behind).attempt) == ("queued", 0)
        server.config_set("maxmemory", "0")
    rig.finish(30)
    assert worker.poll() is None
    for each in (job_id, behind):
        assert (rig.job(each).status, rig.job(each).attempt) == ("succeeded", 1)
    rig.check()


def test_a_worker_that_took_a_refusal_for_a_bug_would_die_of_it(rig: Rig) -> None:
    """The guard is that every answer of a Redis in trouble has one error, which workers know."""
    worker = rig.start(without=("translation",))
    rig.struck(rig.enqueue("refused", "pause@fit"))
    with redis.Redis.from_url(rig.url) as server:
        mend = replica(server)
        eventually(lambda: worker.poll() is not None, 20, "the worker dies")
        mend()
    rig.finish(30, workers=1)
    rig.check()


def test_redis_is_loading(rig: Rig) -> None:
    """Redis starts again, and takes longer than a lease to read its data."""
    worker = rig.start()
    for _ in range(5):
        rig.enqueue("before")
    rig.finish(20)
    job_id = rig.enqueue("loading", "pause@fit")
    behind = rig.enqueue("behind")
    rig.struck(job_id)
    rig.server.kill()
    begun = time.monotonic()
    rig.server.start("--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024")
    assert time.monotonic() - begun > LEASE_SECONDS
    rig.finish(30)
    assert worker.poll() is None
    for each in (job_id, behind):
        assert rig.job(each).status == "succeeded", rig.job(each).error
    rig.check()
