"""Wall clocks jump by an hour in the middle of a job: a worker's, or that of Redis.

Workers measure leases by their monotonic clock, and Redis by its own. A worker's jump is not
noticed. When that of Redis jumps ahead, every lease is over: running jobs may be taken over, once.
When it jumps back, the leases of workers that live are right again at their next heartbeat.
"""

from __future__ import annotations

import time

import pytest
import redis

from core.identifiers import PRODUCTION
from tests.faults.rig import LEASE_SECONDS, InvariantBroken, Rig, is_running, resume
from tests.waiting import eventually

HOUR = 3600


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_the_clock_of_workers_jumps(rig: Rig, seconds: int) -> None:
    rig.keep_up(2)
    job_id = rig.enqueue("steady", "gil@fit", max_seconds=60)
    rig.struck(job_id)
    (rig.faults / "clock").write_text(str(seconds))
    rig.enqueue("behind")
    rig.finish(30)
    assert {rig.job(each).attempt for each in rig.acknowledged} == {1}
    assert rig.job(job_id).status == "succeeded"
    rig.check()


def test_a_worker_that_measured_by_the_wall_clock_would_give_up(rig: Rig) -> None:
    rig.start(without=("monotonic",))
    job_id = rig.enqueue("hasty", "gil@fit", max_seconds=60)
    rig.struck(job_id)
    (rig.faults / "clock").write_text(str(HOUR))
    rig.finish(30)
    assert (rig.job(job_id).status, rig.job(job_id).attempt) != ("succeeded", 1)


def test_a_worker_whose_clock_is_ahead_does_not_undo_a_rollback(rig: Rig) -> None:
    rig.start()
    rig.enqueue("model")
    rig.finish(20)
    (rig.faults / "clock").write_text(str(HOUR))
    job_id = rig.enqueue("model", "stop@announce")
    rig.struck(job_id)
    rig.registry.releases.alias(
        "default", "model", {PRODUCTION: 1}, created_by="me", reason="worse"
    )
    rig.workers[0].kill()
    rig.start()
    rig.finish(20)
    assert rig.job(job_id).attempt == 2
    assert rig.aliases("model") == {PRODUCTION: 1}
    rig.check()


def shift_redis(rig: Rig, seconds: int) -> None:
    with redis.Redis.from_url(rig.url) as client:
        client.set(f"{rig.prefix}:{{graft}}:shift", seconds * 1000)


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_the_clock_of_redis_jumps(rig: Rig, seconds: int) -> None:
    rig.keep_up(2)
    job_id = rig.enqueue("jumped", "gil@fit")
    rig.struck(job_id)
    shift_redis(rig, seconds)
    rig.enqueue("behind")
    rig.finish(30)
    assert {rig.job(each).status for each in rig.acknowledged} == {"succeeded"}
    # Ahead, the other worker takes the job; back, nobody does.
    assert rig.job(job_id).attempt <= (2 if seconds > 0 else 1)
    rig.check()


def test_without_the_fence_a_clock_ahead_lets_a_job_end_twice(rig: Rig) -> None:
    """Every lease is over at once, and whoever had one goes on."""
    first = rig.start(lease=60, without=("fence",))
    job_id = rig.enqueue("jumped", "stop@ask")
    struck = rig.struck(job_id)
    shift_redis(rig, HOUR)
    rig.start()
    assert rig.ended(job_id).attempt == 2
    resume(struck.supervisor, struck.child)
    eventually(lambda: not is_running(struck.child), 10, "the child of the first attempt ends")
    assert first.poll() is None
    rig.enqueue("behind")
    rig.finish(20)
    with pytest.raises(InvariantBroken):
        rig.check()


@pytest.mark.parametrize("without", [(), ("shortening",)], ids=["guarded", "unguarded"])
def test_a_clock_that_goes_back_keeps_no_job_of_a_worker_that_dies_later(
    rig: Rig, without: tuple[str, ...]
) -> None:
    """Its lease ends in an hour, until its next heartbeat sets it right."""
    first = rig.start(without=without)
    job_id = rig.enqueue("kept", "gil@fit")
    rig.struck(job_id)
    shift_redis(rig, -HOUR)
    with redis.Redis.from_url(rig.url) as client:
        leases = f"{rig.prefix}:{{graft}}:leases:fine_tune"

        def lease_ends_in_an_hour() -> bool:
            seconds, _ = client.time()
            ends = client.zscore(leases, f"default/{job_id}")
            return ends is not None and ends / 1000 > seconds - HOUR / 2

        if not without:
            eventually(lambda: not lease_ends_in_an_hour(), 10, "the lease is set right")
    first.kill()
    rig.start(without=without)
    behind = rig.enqueue("behind", priority=-1)
    if not without:
        rig.finish(30)
        assert (rig.job(job_id).status, rig.job(job_id).attempt) == ("succeeded", 2)
        rig.check()
        return
    rig.ended(behind)
    time.sleep(2 * LEASE_SECONDS)
    assert (rig.job(job_id).status, rig.job(job_id).attempt) == ("running", 1)
