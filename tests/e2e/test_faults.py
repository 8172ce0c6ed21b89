"""What a person sees when parts of the stack die: the job goes on, or the error is clear."""

from __future__ import annotations

import io
import os
import shutil
import signal
import zipfile
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.e2e.live_stack import LiveStack, start_stack, stop_stack, unique_rows
from tests.waiting import eventually


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """A stack of one's own, to break."""
    running = start_stack(
        tmp_path_factory.mktemp("fragile"),
        GRAFT_LEASE_SECONDS="2",
        GRAFT_MAX_ATTEMPTS="4",
        GRAFT_INGEST_MEMORY_BYTES=str(64 << 20),
    )
    yield running
    stop_stack(running)


@pytest.fixture
def many(intents: bytes) -> bytes:
    """Enough rows that a job is still running when something is killed."""
    return unique_rows(intents, 3)


def one_version(stack: LiveStack, name: str) -> None:
    listed = stack.http.get(f"/v1/models/{name}").json()
    assert listed["versions"] == [1]


def test_worker_killed_mid_job(fragile: LiveStack, many: bytes) -> None:
    file = fragile.upload("many.csv", many)
    job = fragile.train(file.id, "survivor")
    fragile.running(job.id)
    (worker,) = fragile.pids("training.worker")
    children = fragile.pids("training.child")
    os.kill(worker, signal.SIGKILL)
    # The children must not outlive the one who held their lease.
    eventually(lambda: not set(children) & set(fragile.pids("training.child")), 10, "orphans end")
    done = fragile.finished(job.id)
    assert done.status == "succeeded", done.error
    assert fragile.http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["attempt"] == 2
    assert "job_restarted" in [event["event"] for event in fragile.events(job.id)]
    one_version(fragile, "survivor")


def test_worker_told_to_stop_gives_its_job_back(fragile: LiveStack, many: bytes) -> None:
    file = fragile.upload("many.csv", many)
    job = fragile.train(file.id, "handed-over")
    fragile.running(job.id)
    (worker,) = fragile.pids("training.worker")
    os.kill(worker, signal.SIGTERM)
    # The lease is not waited for: it is given back.
    eventually(lambda: worker not in fragile.pids("training.worker"), 10, "the worker ends")
    done = fragile.finished(job.id)
    assert done.status == "succeeded", done.error
    events = fragile.events(job.id)
    reasons = [e["data"]["reason"] for e in events if e["event"] == "job_restarted"]
    assert reasons == ["worker_stopped"]
    assert "retrying" not in [event["event"] for event in events]
    one_version(fragile, "handed-over")


def test_child_killed_mid_job_is_retried(fragile: LiveStack, many: bytes) -> None:
    file = fragile.upload("many.csv", many)
    idle = set(fragile.pids("training.child fine_tune"))
    job = fragile.train(file.id, "retried")
    fragile.running(job.id)
    busy = eventually(
        lambda: [pid for pid in fragile.pids("training.child fine_tune") if pid in idle],
        10, "a child runs the job",
    )  # fmt: skip
    os.kill(busy[0], signal.SIGKILL)
    done = fragile.finished(job.id)
    assert done.status == "succeeded", done.error
    retrying = [e for e in fragile.events(job.id) if e["event"] == "retrying"]
    assert len(retrying) == 1
    one_version(fragile, "retried")


def test_redis_killed_while_a_job_waits_and_runs(fragile: LiveStack, many: bytes) -> None:
    file = fragile.upload("many.csv", many)
    first, second = (fragile.train(file.id, name) for name in ("before", "behind"))
    fragile.running(first.id)
    (redis,) = fragile.pids("redis.sock")
    os.kill(redis, signal.SIGKILL)
    # `graft up` starts it again on the same append-only file; nothing acknowledged is lost.
    eventually(
        lambda: fragile.http.get("/readyz").json()["redis"] == "connected"
        and fragile.http.get(f"/v1/fine_tuning/jobs/{second.id}").status_code == 200,
        30, "redis is back",
    )  # fmt: skip
    for job, name in ((first, "before"), (second, "behind")):
        done = fragile.finished(job.id)
        assert done.status == "succeeded", done.error
        one_version(fragile, name)


def test_predictions_go_on_without_redis(fragile: LiveStack, intents: bytes) -> None:
    file = fragile.upload("train.csv", intents)
    assert fragile.finished(fragile.train(file.id, "steady").id).status == "succeeded"
    fragile.served("steady")
    (redis,) = fragile.pids("redis.sock")
    os.kill(redis, signal.SIGSTOP)
    try:
        assert fragile.predict("steady", ["hello"])["model"] == "steady@1"
        refused = fragile.http.get(f"/v1/fine_tuning/jobs/{file.id}")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "unavailable"
    finally:
        os.kill(redis, signal.SIGCONT)
    eventually(
        lambda: fragile.http.get("/v1/fine_tuning/jobs").status_code == 200, 30, "redis answers"
    )


def test_redis_comes_back_empty(fragile: LiveStack, intents: bytes) -> None:
    file = fragile.upload("train.csv", intents)
    job = fragile.finished(fragile.train(file.id, "remembered").id)
    assert job.status == "succeeded", job.error
    fragile.served("remembered")
    events = fragile.events(job.id)
    record = fragile.data / "store/default/runs" / job.id / "record.json"
    eventually(record.exists, 10, "the job is archived")
    (redis,) = fragile.pids("redis.sock")
    shutil.rmtree(fragile.data / "redis")
    (fragile.data / "redis").mkdir()
    os.kill(redis, signal.SIGKILL)
    eventually(
        lambda: redis not in fragile.pids("redis.sock")
        and fragile.http.get("/readyz").json()["redis"] == "connected"
        and fragile.http.get("/v1/fine_tuning/jobs").status_code == 200,
        30, "an empty Redis",
    )  # fmt: skip
    assert fragile.predict("remembered", ["hello"])["model"] == "remembered@1"
    assert fragile.job(job.id) == job
    assert fragile.events(job.id) == events
    # A service process reads the list of archived jobs anew every few seconds.
    eventually(
        lambda: job.id in [each.id for each in fragile.openai.fine_tuning.jobs.list()],
        30, "the archived job is listed",
    )  # fmt: skip
    report, metrics = job.report, job.result_files[0]  # type: ignore[attr-defined]
    contents = fragile.openai.files.content
    assert contents(report).json()["job"] == job.id
    assert contents(metrics).text.startswith("created_at,")
    # What comes next needs nothing of what was forgotten.
    again = fragile.finished(fragile.train(file.id, "remembered").id)
    assert again.fine_tuned_model == "remembered@2"


def test_upload_that_needs_too_much_memory_ends_in_error(fragile: LiveStack) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
            # 75 MB when decoded, which is more than the parsing child may have.
            picture = io.BytesIO()
            Image.new("RGB", (5000, 5000), "red" if name[0] == "a" else "blue").save(picture, "PNG")
            archive.writestr(name, picture.getvalue())
    file = fragile.upload("large.zip", data.getvalue())
    assert file.status == "error"
    assert file.status_details
    assert "memory" in file.status_details
    # The next upload has a fresh child.
    assert fragile.upload("d.csv", b"text,label\na,x\nb,x\nc,y\nd,y\n").status == "processed"
