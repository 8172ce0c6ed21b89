"""Workers are killed at each named step of a job; another takes over, and nothing is twice."""

from __future__ import annotations

import os
import signal

import pytest

from core.errors import NotFound
from tests.faults.rig import LEASE_SECONDS, InvariantBroken, Rig, is_running
from tests.waiting import eventually

STEPS = (
    "claim", "data", "trunk", "features", "fit", "export", "ask", "write", "publication",
    "manifest", "release", "announce", "settle",
)  # fmt: skip
IN_SUPERVISOR = {"claim", "announce", "settle"}
AFTER_DECISION = {"publication", "manifest", "release", "announce", "settle"}


@pytest.mark.parametrize(
    ("steps", "light"), [(STEPS, True), (("write",), False)], ids=["light", "real"]
)
def test_a_worker_killed_at_each_step(rig: Rig, steps: tuple[str, ...], light: bool) -> None:
    """The child is left to notice by itself that its supervisor is gone."""
    rig.keep_up(2, light=light)
    jobs = {step: rig.enqueue(f"at-{step}", f"kill@{step}") for step in steps}
    rig.finish(60, workers=2, light=light)
    for step, job_id in jobs.items():
        job = rig.job(job_id)
        # What was announced needs no second attempt to be told.
        attempts = 1 if step == "settle" else 2
        assert (job.status, job.attempt) == ("succeeded", attempts), (step, job.error)
        published = rig.registry.publication("default", job_id)
        assert published is not None
        # Who comes second after the decision rolls it forward, and makes no version of its own.
        assert published.attempt == (1 if step in AFTER_DECISION else 2), step
        if step not in IN_SUPERVISOR:
            assert not is_running(rig.struck(job_id).child)
    rig.check()


def test_a_worker_killed_at_an_epoch(rig: Rig) -> None:
    """The next attempt goes on from the last epoch; tests/e2e shows that it ends the same."""
    rig.keep_up(1, light=False)
    few = {"n_epochs": 3}
    job_id = rig.enqueue("epoch", "kill@epoch", strategy="gradual", hyperparameters=few)
    rig.finish(90, workers=1, light=False)
    job, events = rig.job(job_id), rig.events(job_id)
    assert (job.status, job.attempt) == ("succeeded", 2), job.error
    (restored,) = (event for event in events if event.type == "state_restored")
    assert restored.data["from_step"] == 1
    rig.check()


def test_a_host_that_loses_power_between_two_files(rig: Rig) -> None:
    rig.keep_up(2)
    for step in ("write", "publication", "manifest", "release"):
        rig.enqueue("shared", f"host@{step}")
    rig.finish(40, workers=2)
    rig.check()
    assert rig.registry.versions("default", "shared")[-1] >= 4


@pytest.mark.parametrize("without", [(), ("lifeline",)], ids=["guarded", "unguarded"])
def test_a_child_ends_with_its_supervisor(rig: Rig, without: tuple[str, ...]) -> None:
    rig.start(without=without)
    struck = rig.struck(rig.enqueue("orphan", "kill@fit"))
    if without:
        with pytest.raises(AssertionError, match="the orphan ends"):
            eventually(lambda: not is_running(struck.child), 1, "the orphan ends")
        os.kill(struck.child, signal.SIGKILL)
    else:
        eventually(lambda: not is_running(struck.child), 1, "the orphan ends")
    rig.finish(20, workers=1)
    rig.check()


def test_without_its_job_s_publication_a_version_is_listed_twice(rig: Rig) -> None:
    """The guard against a second version is the job's publication, and nothing else."""
    rig.start(without=("publication",))
    rig.enqueue("twice", "kill@announce")
    rig.finish(20, workers=1, without=("publication",))
    with pytest.raises(InvariantBroken):
        rig.check()
    assert rig.registry.versions("default", "twice") == [1, 2]


def test_a_manifest_that_were_not_last_would_list_half_a_version(rig: Rig) -> None:
    rig.start(without=("order",))
    rig.enqueue("half", "host@write")
    rig.finish(20, workers=1)
    with pytest.raises(InvariantBroken, match="does not exist"):
        rig.check()


@pytest.mark.parametrize("without", [(), ("decision",)], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("step", ["manifest", "announce", "settle"])
def test_a_job_that_published_does_not_fail_for_want_of_attempts(
    rig: Rig, step: str, without: tuple[str, ...]
) -> None:
    rig.max_attempts = 1
    rig.start(without=without)
    job_id = rig.enqueue("published", f"kill@{step}")
    rig.finish(20, workers=1, without=without)
    if without:
        with pytest.raises(InvariantBroken, match="is failed and has"):
            rig.check()
    else:
        assert rig.job(job_id).status == "succeeded"
        rig.check()


@pytest.mark.parametrize("without", [(), ("decision",)], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("step", ["manifest", "settle"])
def test_a_job_that_published_is_not_cancelled_when_its_worker_dies(
    rig: Rig, step: str, without: tuple[str, ...]
) -> None:
    rig.start(without=without)
    job_id = rig.enqueue("published", f"stop@{step}")
    rig.struck(job_id)
    rig.run(rig.queue.cancel("default", job_id))
    rig.workers[0].kill()
    rig.finish(20, workers=1, without=without)
    if without:
        with pytest.raises(InvariantBroken, match="is cancelled and has"):
            rig.check()
    else:
        assert rig.job(job_id).status == "succeeded"
        rig.check()


def test_a_cancel_counts_when_the_job_had_leave_but_did_not_publish(rig: Rig) -> None:
    rig.start()
    job_id = rig.enqueue("unpublished", "stop@write")
    rig.struck(job_id)
    rig.run(rig.queue.cancel("default", job_id))
    rig.workers[0].kill()
    rig.finish(20, workers=1)
    assert rig.job(job_id).status == "cancelled"
    rig.check()


def test_without_its_lease_the_job_of_a_dead_worker_is_lost(rig: Rig) -> None:
    rig.start(without=("lease",))
    job_id = rig.enqueue("lost", "kill@claim")
    rig.struck(job_id)
    rig.start()
    with pytest.raises(AssertionError, match="ends"):
        rig.ended(job_id, 4 * LEASE_SECONDS)
    assert rig.job(job_id).status == "running"


def test_a_job_whose_every_worker_dies_fails_with_the_reason(rig: Rig) -> None:
    rig.keep_up(2)
    job_id = rig.enqueue("cursed", "kill@fit!")
    rig.finish(40, workers=2)
    job = rig.job(job_id)
    assert job.error is not None
    assert (job.status, job.error.code, job.attempt) == ("failed", "worker_lost", rig.max_attempts)
    with pytest.raises(NotFound):
        rig.registry.manifest("default", "cursed", 1)
    rig.check()
