"""Two workers in containers of their own, as on two hosts: one dies, one is cut off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.containers.engine import Stack, docker
from tests.containers.test_containers import pairs
from tests.waiting import eventually

pytestmark = pytest.mark.containers

ROWS = 480


@pytest.fixture(scope="module")
def workers(stack: Stack) -> Iterator[list[str]]:
    """The ids of two workers' containers."""
    stack.up(workers=2)
    yield stack.containers("worker")
    stack.up()


def workers_of(stack: Stack, job_id: str) -> list[str]:
    """The container of each attempt that has started."""
    events = stack.openai.fine_tuning.jobs.list_events(job_id, limit=100).data
    started = [
        event for event in reversed(events) if (event.model_extra or {})["event"] == "started"
    ]
    names = [str(event.data["worker"]) for event in started]  # type: ignore[index]
    return [name.partition("-")[0] for name in names]


def health(container: str) -> str:
    """Return what a container's last health checks have found."""
    return docker("inspect", "--format", "{{.State.Health.Status}}", container)


def begin(stack: Stack, intents: bytes, name: str, seed: int) -> str:
    """Create a job on data that no job has seen; return its id."""
    file = stack.upload(f"{name}.csv", pairs(intents, rows=ROWS, seed=seed))
    return stack.train(file.id, name).id


def running_on(stack: Stack, job_id: str) -> str:
    """Wait until a job runs; return the container that has it."""
    return eventually(lambda: workers_of(stack, job_id) or None, 60, f"{job_id} runs")[-1]


def require_one_version(stack: Stack, job_id: str, name: str, second: str) -> None:
    """The job's second attempt, in the container `second`, has published its only version."""
    job = stack.succeeded(job_id)
    assert job.fine_tuned_model == f"{name}@1"
    assert (job.model_extra or {})["attempt"] == 2
    assert second.startswith(workers_of(stack, job_id)[1])
    assert stack.get(f"/v1/models/{name}").json()["versions"] == [1]


def test_jobs_are_spread_and_a_lost_container_s_job_is_taken_over(
    stack: Stack, intents: bytes, workers: list[str]
) -> None:
    jobs = [begin(stack, intents, f"spread-{n}", seed=n) for n in (1, 2)]
    places = [running_on(stack, job_id) for job_id in jobs]
    assert len(set(places)) == 2
    killed = next(worker for worker in workers if worker.startswith(places[0]))
    docker("kill", "--signal", "KILL", killed)
    (other,) = set(workers) - {killed}
    try:
        require_one_version(stack, jobs[0], "spread-1", other)
        assert stack.succeeded(jobs[1]).fine_tuned_model == "spread-2@1"
    finally:
        docker("start", killed)


def test_a_worker_that_is_cut_off_gives_way_and_comes_back(
    stack: Stack, intents: bytes, workers: list[str]
) -> None:
    job_id = begin(stack, intents, "cut-off", seed=3)
    place = running_on(stack, job_id)
    cut_off = next(worker for worker in workers if worker.startswith(place))
    (other,) = set(workers) - {cut_off}
    network = f"{stack.project}_default"
    docker("network", "disconnect", network, cut_off)
    try:
        # Nobody can tell it that its lease is over: by its own clock it ends its child.
        eventually(
            lambda: f"{job_id}: left to others" in stack.container_logs(cut_off), 30, "it gives up"
        )
        require_one_version(stack, job_id, "cut-off", other)
    finally:
        docker("network", "connect", network, cut_off)
    docker("pause", other)
    try:
        fewer = b"".join(intents.splitlines(keepends=True)[:101])
        again = stack.train(stack.upload("fewer.csv", fewer).id, "again").id
        assert stack.succeeded(again).fine_tuned_model == "again@1"
        assert workers_of(stack, again) == [place]
    finally:
        docker("unpause", other)
        # A paused container has failed its health checks.
        eventually(lambda: health(other) == "healthy", 60, "it is well again")
