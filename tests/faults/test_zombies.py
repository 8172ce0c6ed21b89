"""A worker is stopped for longer than its lease, another finishes, and the first one goes on.

It must not publish, settle or move an alias: Redis refuses it by the attempt, and the store by the
job's publication, each without the other's help.
"""

from __future__ import annotations

import pytest

from core.identifiers import PRODUCTION
from tests.faults.rig import InvariantBroken, Rig, is_running, resume
from tests.waiting import eventually


def outlive(rig: Rig, name: str, step: str, **options: object) -> str:
    """Let a worker be stopped at `step` and another finish its job; return the job's id."""
    rig.start(**options)  # type: ignore[arg-type]
    job_id = rig.enqueue(name, f"stop@{step}")
    rig.struck(job_id)
    rig.start()
    job = rig.ended(job_id)
    assert (job.status, job.attempt) == ("succeeded", 2), job.error
    rig.check()
    return job_id


def test_redis_refuses_a_zombie_that_asks(rig: Rig) -> None:
    job_id = outlive(rig, "asked", "ask")
    zombie = rig.struck(job_id)
    before = rig.events(job_id)
    resume(zombie.supervisor, zombie.child)
    eventually(lambda: not is_running(zombie.child), 5, "the zombie's child ends")
    assert rig.events(job_id) == before
    assert rig.registry.versions("default", "asked") == [1]
    rig.check()
    # The worker itself is well and takes jobs again.
    rig.workers[1].kill()
    rig.enqueue("next")
    rig.finish(10)
    rig.check()


def test_the_store_refuses_a_zombie_that_does_not_ask(rig: Rig) -> None:
    job_id = outlive(rig, "unasked", "ask", without=("ask",))
    zombie = rig.struck(job_id)
    resume(zombie.child)  # its supervisor sleeps on, so nothing but the store can refuse it
    eventually(lambda: not is_running(zombie.child), 5, "the zombie's child ends")
    resume(zombie.supervisor)
    assert rig.registry.versions("default", "unasked") == [1]
    rig.check()


def test_a_zombie_that_wakes_between_two_files_of_its_version(rig: Rig) -> None:
    job_id = outlive(rig, "late", "write")
    zombie = rig.struck(job_id)
    resume(zombie.child)  # it goes on to its end before its supervisor can stop it
    eventually(lambda: not is_running(zombie.child), 5, "the zombie's child ends")
    resume(zombie.supervisor)
    assert len(rig.registry.versions("default", "late")) == 1
    rig.check()


@pytest.mark.parametrize("step", ["publication", "manifest", "release"])
def test_a_zombie_does_not_move_production_back(rig: Rig, step: str) -> None:
    """Meanwhile a later job has published and released the next version of the same model."""
    job_id = outlive(rig, "model", step)
    zombie = rig.struck(job_id)
    rig.enqueue("model")
    rig.finish(10)
    resume(zombie.child)  # it goes on to its end before its supervisor can stop it
    eventually(lambda: not is_running(zombie.child), 5, "the zombie's child ends")
    resume(zombie.supervisor)
    assert rig.aliases("model") == {PRODUCTION: 2}
    rig.check()


def test_a_second_attempt_does_not_undo_a_rollback(rig: Rig) -> None:
    """Version 2 was released and rolled back while the job's first worker was gone."""
    rig.start()
    rig.enqueue("model")
    rig.finish(10)
    job_id = rig.enqueue("model", "stop@announce")
    rig.struck(job_id)
    rig.registry.releases.alias(
        "default", "model", {PRODUCTION: 1}, created_by="me", reason="worse"
    )
    rig.workers[0].kill()
    rig.start()
    rig.finish(10)
    assert rig.job(job_id).attempt >= 2
    assert rig.aliases("model") == {PRODUCTION: 1}
    rig.check()


def test_a_second_attempt_does_not_move_production_back(rig: Rig) -> None:
    """The job's first attempt released version 1 and died; before the second, 2 was released."""
    first = rig.start()
    job_id = rig.enqueue("model", "stop@announce")
    rig.struck(job_id)
    rig.start(lease=20)
    # The lease of the stopped worker runs for another second, in which the next job is done.
    rig.enqueue("model", priority=100)
    first.kill()
    rig.finish(10)
    assert rig.job(job_id).attempt >= 2
    assert rig.aliases("model") == {PRODUCTION: 2}
    rig.check()


@pytest.mark.parametrize("without", [(), ("withdrawal",)], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_a_zombie_with_leave_does_not_publish_a_job_that_ended_meanwhile(
    rig: Rig, end: str, without: tuple[str, ...]
) -> None:
    """It had leave, and its version's files were there; it slept before the decision was."""
    rig.max_attempts = 1 if end == "failed" else rig.max_attempts
    rig.start()
    job_id = rig.enqueue("ended", "stop@put-publication-1.json")
    zombie = rig.struck(job_id)
    if end == "cancelled":
        rig.run(rig.queue.cancel("default", job_id))
    rig.start(without=without)
    assert rig.ended(job_id).status == end
    resume(zombie.child)  # it goes on to its end before its supervisor can stop it
    eventually(lambda: not is_running(zombie.child), 5, "the zombie's child ends")
    resume(zombie.supervisor)
    if without:
        with pytest.raises(InvariantBroken, match=f"is {end} and has"):
            rig.check()
    else:
        assert rig.registry.catalogue("default") == {}
        rig.check()


def test_without_both_fences_a_zombie_publishes_a_second_version(rig: Rig) -> None:
    job_id = outlive(rig, "twice", "ask", without=("ask", "publication"))
    zombie = rig.struck(job_id)
    resume(zombie.child)
    eventually(
        lambda: rig.registry.versions("default", "twice") == [1, 2], 5, "the zombie publishes"
    )
    with pytest.raises(InvariantBroken):
        rig.check()


def test_without_the_fence_in_redis_a_job_ends_twice(rig: Rig) -> None:
    job_id = outlive(rig, "unfenced", "ask", without=("fence",))
    zombie = rig.struck(job_id)
    resume(zombie.supervisor, zombie.child)
    eventually(lambda: not is_running(zombie.child), 5, "the zombie's child ends")
    rig.finish(10)
    with pytest.raises(InvariantBroken):
        rig.check()
