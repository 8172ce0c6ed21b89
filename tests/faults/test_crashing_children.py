"""A job's child crashes, is killed, wants too much memory, or lets no other thread run."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.faults import GIL_SECONDS
from tests.faults.rig import LEASE_SECONDS, Rig, is_running
from tests.waiting import eventually


def test_a_child_that_crashes_once_is_started_again(rig: Rig) -> None:
    rig.start()
    faults = ("segfault@fit", "exit@features", "oomkill@export", "segfault@write", "exit@release")
    jobs = {fault: rig.enqueue(f"model-{n}", fault) for n, fault in enumerate(faults)}
    rig.finish(30)
    for fault, job_id in jobs.items():
        job = rig.job(job_id)
        assert (job.status, job.attempt) == ("succeeded", 2), (fault, job.error)
        assert len([e for e in rig.events(job_id) if e.type == "retrying"]) == 1
    rig.check()


def test_a_child_that_always_crashes_fails_with_the_reason(rig: Rig) -> None:
    rig.start()
    reasons = {
        "segfault@fit!": ("crashed", rig.max_attempts),
        "oomkill@fit!": ("out_of_memory", rig.max_attempts),
        "eat@fit!": ("out_of_memory", 1),
    }
    jobs = {fault: rig.enqueue(f"model-{n}", fault) for n, fault in enumerate(reasons)}
    well = rig.enqueue("well")
    rig.finish(40)
    for fault, (code, attempts) in reasons.items():
        job = rig.job(jobs[fault])
        assert job.error is not None
        assert (job.status, job.error.code, job.attempt) == ("failed", code, attempts), fault
    assert rig.job(well).status == "succeeded"
    rig.check()


def test_a_child_that_holds_the_gil_for_longer_than_a_lease_keeps_its_job(rig: Rig) -> None:
    assert GIL_SECONDS > 2 * LEASE_SECONDS
    rig.keep_up(2)
    job_id = rig.enqueue("greedy", "gil@fit")
    rig.finish(20)
    job = rig.job(job_id)
    assert (job.status, job.attempt) == ("succeeded", 1)
    rig.check()


@pytest.mark.parametrize("without", [(), ("lifeline",)], ids=["guarded", "unguarded"])
def test_a_child_that_holds_the_gil_ends_with_its_supervisor(
    rig: Rig, without: tuple[str, ...]
) -> None:
    rig.start(without=without)
    struck = rig.struck(rig.enqueue("orphan", "cut@fit"))
    try:
        if without:
            with pytest.raises(AssertionError, match="the orphan ends"):
                eventually(lambda: not is_running(struck.child), 1, "the orphan ends")
        else:
            eventually(lambda: not is_running(struck.child), 1, "the orphan ends")
    finally:
        if is_running(struck.child):
            os.kill(struck.child, signal.SIGKILL)
    rig.finish(20, workers=1)
    rig.check()


def test_a_job_that_hangs_is_ended_at_its_limit(rig: Rig) -> None:
    rig.start()
    job_id = rig.enqueue("slow", "gil@fit!", max_seconds=1)
    rig.finish(60)
    at = {event.type: event.created_at for event in rig.events(job_id)}
    assert at["failed"] - at["started"] < GIL_SECONDS
    error = rig.job(job_id).error
    assert error is not None
    assert error.code == "timeout"
    rig.check()
