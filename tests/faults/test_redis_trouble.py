"""Redis dies, comes back, or answers that it cannot serve: workers live on and no job is lost."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis

from core.errors import Unavailable
from core.queue.connection import translated
from tests.faults.rig import LEASE_SECONDS, Rig

AWAY_SECONDS = 1.7 * LEASE_SECONDS


def test_redis_killed_and_back_within_a_lease(rig: Rig) -> None:
    """The worker insists, and its attempt goes on."""
    rig.start(lease=10)
    job_id = rig.enqueue("steady", "pause@fit")
    behind = [rig.enqueue("behind") for _ in range(3)]
    rig.struck(job_id)
    rig.server.kill()
    time.sleep(0.5)
    rig.server.start()
    rig.finish(30)
    for each in (job_id, *behind):
        assert (rig.job(each).status, rig.job(each).attempt) == ("succeeded", 1)
    rig.check()


def test_redis_away_for_longer_than_a_lease(rig: Rig) -> None:
    """The worker must take its lease for lost, and ends its child."""
    worker = rig.start()
    job_id = rig.enqueue("lost", "pause@fit")
    behind = [rig.enqueue("behind") for _ in range(3)]
    rig.struck(job_id)
    rig.server.kill()
    time.sleep(AWAY_SECONDS)
    rig.server.start()
    rig.finish(30)
    assert worker.poll() is None
    assert (rig.job(job_id).status, rig.job(job_id).attempt) == ("succeeded", 2)
    assert all(rig.job(each).status == "succeeded" for each in behind)
    rig.check()


def out_of_memory(server: redis.Redis) -> Callable[[], object]:
    server.config_set("maxmemory-policy", "noeviction")
    server.config_set("maxmemory", "1")
    return lambda: server.config_set("maxmemory", "0")


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
    [(out_of_memory, "out of memory"), (replica, "is a replica"), (cannot_save, "cannot save")],
    ids=["oom", "readonly", "misconf"],
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
