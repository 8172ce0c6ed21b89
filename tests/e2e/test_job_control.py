"""Pause, resume, cancel and checkpoints of real jobs, through the official client."""

from __future__ import annotations

import openai
import pytest

from tests.e2e.live_stack import LiveStack
from tests.waiting import eventually

ROWS = 1_000


@pytest.fixture(scope="module")
def long_file(stack: LiveStack) -> str:
    """Texts that take long enough to compute features of, and that no other job has computed."""
    rows = "".join(
        f"parcel {n} of order {n * 7919} is {kind},{kind}\n"
        for n in range(ROWS // 2)
        for kind in ("late", "lost")
    )
    file = stack.upload("long.csv", b"text,label\n" + rows.encode())
    assert file.status == "processed", file.status_details
    return file.id


def reached(stack: LiveStack, job_id: str, status: str) -> None:
    eventually(lambda: stack.job(job_id).status == status, 60, f"{job_id} is {status}")


def kinds(stack: LiveStack, job_id: str) -> list[str]:
    return [event["event"] for event in stack.events(job_id)]


def test_pause_frees_the_worker_and_resume_goes_on(
    stack: LiveStack, long_file: str, intents: bytes
) -> None:
    jobs = stack.openai.fine_tuning.jobs
    job = stack.train(long_file, "paused")
    stack.running(job.id)
    assert jobs.pause(job.id).status in ("running", "paused")
    reached(stack, job.id, "paused")
    with pytest.raises(openai.ConflictError):
        stack.openai.files.delete(long_file)

    other = stack.upload("train.csv", intents)
    assert stack.finished(stack.train(other.id, "meanwhile").id).status == "succeeded"
    assert jobs.retrieve(job.id).status == "paused"
    assert jobs.resume(job.id).status == "queued"
    ended = stack.finished(job.id)
    assert ended.status == "succeeded", ended.error
    told = kinds(stack, job.id)
    for kind in ("pause_requested", "paused", "resumed", "published", "serving", "succeeded"):
        assert told.count(kind) == 1, told
    serving = next(e for e in stack.events(job.id) if e["event"] == "serving")
    assert serving["data"] == {"acknowledged": 2, "refused": 0, "of": 2}
    assert told[-1] == "succeeded"
    with pytest.raises(openai.ConflictError):
        jobs.resume(job.id)


def test_cancel_of_a_paused_job_and_of_a_running_one(stack: LiveStack, long_file: str) -> None:
    jobs = stack.openai.fine_tuning.jobs
    running, waiting = (stack.train(long_file, "never", seed=n) for n in (1, 2))
    stack.running(running.id)
    assert jobs.pause(waiting.id).status == "paused"
    assert jobs.cancel(waiting.id).status == "cancelled"
    jobs.cancel(running.id, extra_body={"keep_best": True})
    reached(stack, running.id, "cancelled")
    # Its strategy keeps no checkpoints, and what there is none of cannot be kept.
    assert jobs.checkpoints.list(running.id).data == []
    assert stack.http.get("/v1/models/never").status_code == 404
    assert kinds(stack, running.id)[-1] == "cancelled"
