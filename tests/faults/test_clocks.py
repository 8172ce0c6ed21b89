"""Wall clocks jump by an hour in the middle of a job: a worker's, or that of Redis.

Workers measure leases by their monotonic clock, and Redis by its own. A worker's jump is not
noticed. When that of Redis jumps ahead, every lease is over: running jobs may be taken over, once.
When it jumps back, the leases of workers that live are right again at their next heartbeat.
"""

from __future__ import annotations

import pytest
import redis

from core.identifiers import PRODUCTION
from tests.faults.rig import Rig

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


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_the_clock_of_redis_jumps(rig: Rig, seconds: int) -> None:
    rig.keep_up(2)
    job_id = rig.enqueue("jumped", "gil@fit")
    rig.struck(job_id)
    with redis.Redis.from_url(rig.url) as client:
        client.set(f"{rig.prefix}:{{graft}}:shift", seconds * 1000)
    rig.enqueue("behind")
    rig.finish(30)
    assert {rig.job(each).status for each in rig.acknowledged} == {"succeeded"}
    # Ahead, the other worker takes the job; back, nobody does.
    assert rig.job(job_id).attempt <= (2 if seconds > 0 else 1)
    rig.check()
