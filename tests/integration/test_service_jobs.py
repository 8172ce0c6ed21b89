"""`/v1/fine_tuning/jobs` through the official client, with a worker played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx
import openai as sdk
import orjson
import pytest

from core.datasets import DatasetManifest, FileErrors, Modality, RowError
from core.files import FileStore
from core.jobs import Failure, JobKind, JobStatus
from core.outlook import Progress
from service.api.files import ingest_job_id

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.fine_tuning import FineTuningJob

    from tests.integration.service_process import FakeWorker, ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]

MANIFEST = DatasetManifest(modality=Modality.TEXT, rows=2, counts={"a": 1, "b": 1}, sha256="0")


@pytest.fixture
async def file_id(openai: AsyncOpenAI, service: ServiceProcess) -> AsyncIterator[str]:
    """A processed file."""
    file = await openai.files.create(file=("a.csv", b"text,label\na,b\n"), purpose="fine-tune")
    FileStore(service.store, "default").accept(file.id, b"parquet", MANIFEST)
    return file.id


async def create(openai: AsyncOpenAI, file_id: str, **extra: Any) -> FineTuningJob:
    return await openai.fine_tuning.jobs.create(
        model="minilm", training_file=file_id, extra_body=extra
    )


async def test_a_job_from_birth_to_success(openai: AsyncOpenAI, worker: FakeWorker, file_id: str):
    job = await openai.fine_tuning.jobs.create(
        model="minilm", training_file=file_id, suffix="support", seed=7,
        metadata={"team": "blue"}, method={"type": "supervised"},
    )  # fmt: skip
    assert (job.object, job.status, job.model) == ("fine_tuning.job", "queued", "minilm")
    assert (job.training_file, job.seed, job.metadata) == (file_id, 7, {"team": "blue"})
    assert job.error is None
    assert job.queue_position is not None  # type: ignore[attr-defined]
    claim = await worker.claim(job.id)
    await worker.queue.heartbeat(claim, 30, Progress(stage="fit", fraction=0.5))
    job = await openai.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "running"
    assert job.progress["fraction"] == 0.5  # type: ignore[attr-defined]
    assert job.attempt == 1  # type: ignore[attr-defined]
    result = {"fine_tuned_model": "support@1", "metrics": {"accuracy": 0.9}}
    await worker.queue.settle(claim, JobStatus.SUCCEEDED, result=result)
    job = await openai.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", "support@1")
    assert job.metrics == {"accuracy": 0.9}  # type: ignore[attr-defined]
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at


async def test_a_job_waits_for_its_file_and_then_runs(openai: AsyncOpenAI, worker: FakeWorker):
    file = await openai.files.create(file=("a.csv", b"x"), purpose="fine-tune")
    job = await create(openai, file.id)
    assert job.status == "validating_files"
    await worker.settle(ingest_job_id(file.id), kind=JobKind.INGEST)
    assert (await openai.fine_tuning.jobs.retrieve(job.id)).status == "queued"


async def test_a_job_fails_with_its_files_error(openai: AsyncOpenAI, worker: FakeWorker):
    file = await openai.files.create(file=("a.csv", b"x"), purpose="fine-tune")
    job = await create(openai, file.id)
    failure = Failure(code="data_error", message="line 3: label is empty", param="training_file")
    await worker.settle(
        ingest_job_id(file.id), JobStatus.FAILED, kind=JobKind.INGEST, error=failure
    )
    job = await openai.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.message) == ("data_error", "line 3: label is empty")


async def test_cancelling_a_waiting_job_and_a_running_one(
    openai: AsyncOpenAI, worker: FakeWorker, file_id: str
):
    waiting, running = await create(openai, file_id), await create(openai, file_id, priority=9)
    assert (await openai.fine_tuning.jobs.cancel(waiting.id)).status == "cancelled"
    claim = await worker.claim(running.id)
    asked = await openai.fine_tuning.jobs.cancel(running.id)
    assert asked.status == "running"
    assert asked.cancel_requested is True  # type: ignore[attr-defined]
    assert await worker.queue.heartbeat(claim, 30)
    await worker.queue.settle(claim, JobStatus.CANCELLED)
    with pytest.raises(sdk.ConflictError):
        await openai.fine_tuning.jobs.cancel(running.id)


async def test_jobs_are_listed_newest_first_in_pages(openai: AsyncOpenAI, file_id: str):
    ids = [(await create(openai, file_id)).id for _ in range(5)]
    listed = [job.id async for job in openai.fine_tuning.jobs.list(limit=2)]
    assert listed[:5] == ids[::-1]
    page = await openai.fine_tuning.jobs.list(limit=2, after=ids[1])
    assert page.data[0].id == ids[0]


async def test_events_page_newest_first(openai: AsyncOpenAI, worker: FakeWorker, file_id: str):
    job = await create(openai, file_id)
    claim = await worker.claim(job.id)
    for n in range(5):
        await worker.queue.append_event(claim, "metrics", f"step {n}", data={"step": n})
    await worker.queue.settle(claim, JobStatus.SUCCEEDED)
    events = [e async for e in openai.fine_tuning.jobs.list_events(job.id, limit=3)]
    messages = [event.message for event in events]
    assert messages[1:6] == [f"step {n}" for n in reversed(range(5))]
    assert events[0].event == "succeeded"  # type: ignore[attr-defined]
    assert events[1].type == "metrics"
    assert len({event.id for event in events}) == len(events)


async def streamed(
    http: httpx.AsyncClient, job_id: str, limit: int | None = None, **headers: str
) -> list[dict[str, Any]]:
    """Read a stream of events to its end, or until there were `limit`."""
    found: list[dict[str, Any]] = []
    path = f"/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    async with http.stream("GET", path, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        event_id = ""
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            if line.startswith("data: "):
                found.append(orjson.loads(line.removeprefix("data: ")))
                assert found[-1]["id"] == event_id
                if len(found) == limit:
                    break
    return found


async def test_a_stream_is_live_resumes_without_gap_or_repeat_and_ends(
    http: httpx.AsyncClient, openai: AsyncOpenAI, worker: FakeWorker, file_id: str
):
    job = await create(openai, file_id)
    claim = await worker.claim(job.id)
    whole = asyncio.create_task(streamed(http, job.id))
    first = asyncio.create_task(streamed(http, job.id, limit=4))
    for n in range(3):
        await worker.queue.append_event(claim, "log", f"line {n}\nwith two\r\nbreaks")
    async with asyncio.timeout(10):
        begun = await first
    resumed = asyncio.create_task(streamed(http, job.id, **{"Last-Event-ID": begun[-1]["id"]}))
    for n in range(3, 6):
        await worker.queue.append_event(claim, "log", f"line {n}")
    await worker.queue.settle(claim, JobStatus.SUCCEEDED)
    async with asyncio.timeout(10):
        everything, rest = await asyncio.gather(whole, resumed)
    assert begun + rest == everything
    assert everything[-1]["event"] == "succeeded"
    assert [e["message"][:6] for e in everything if e["event"] == "log"] == [
        f"line {n}" for n in range(6)
    ]
    async with asyncio.timeout(15):
        behind = await streamed(http, job.id, **{"Last-Event-ID": everything[-1]["id"]})
    assert behind == []


@pytest.mark.parametrize(
    "cursor", ["x", "ftevent-", "1-", "9999999999999999-0", "٣-٣", "1-2-3", "-1-0", "1.5-0"]
)
async def test_a_bad_cursor_is_refused_before_the_stream_begins(
    http: httpx.AsyncClient, openai: AsyncOpenAI, file_id: str, cursor: str
):
    job = await create(openai, file_id)
    path = f"/v1/fine_tuning/jobs/{job.id}/events"
    for params in ({"stream": "true", "after": cursor}, {"after": cursor}):
        response = await http.get(path, params=params)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "after"


async def test_a_flag_and_a_cursor_that_make_no_sense_are_refused(
    http: httpx.AsyncClient, openai: AsyncOpenAI, file_id: str
):
    jobs = "/v1/fine_tuning/jobs"
    events = f"{jobs}/{(await create(openai, file_id)).id}/events"
    for path, param in (
        (f"{events}?stream=maybe", "stream"),
        (f"{jobs}?after=ftjob-none", "after"),
        (f"{jobs}?after=ftjob-none&metadata=null", "after"),
        ("/v1/files?order=up", "order"),
    ):
        response = await http.get(path)
        assert response.status_code == 400, path
        assert response.json()["error"]["param"] == param


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt-4o"}, "model"),
    ({"model": "hf:org/evil"}, "model"),
    ({"training_file": "file-none"}, "training_file"),
    ({"training_file": "../etc/passwd"}, "training_file"),
    ({"training_file": None}, "training_file"),
    ({"validation_file": "file-none"}, "validation_file"),
    ({"suffix": "No Capitals"}, "suffix"),
    ({"suffix": "a/../b"}, "suffix"),
    ({"suffix": "minilm"}, "suffix"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"priority": 101}, "priority"),
    ({"max_seconds": 0}, "max_seconds"),
    ({"metadata": {"k": "v" * 513}}, "metadata"),
    ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
    ({"strategy": "magic"}, "strategy"),
    ({"unknown": 1}, "unknown"),
    ({"method": {"type": "dpo"}}, "method"),
    ({"quality_gate": {}}, "quality_gate"),
]


@pytest.mark.parametrize(("change", "param"), BAD)
async def test_a_bad_request_names_its_field(
    http: httpx.AsyncClient, file_id: str, change: dict[str, Any], param: str
):
    body = {"model": "minilm", "training_file": file_id} | change
    response = await http.post("/v1/fine_tuning/jobs", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert len(error["message"]) < 2000


async def test_an_unusable_file_is_refused_at_once(openai: AsyncOpenAI, service: ServiceProcess):
    file = await openai.files.create(file=("a.csv", b"x"), purpose="fine-tune")
    errors = FileErrors(errors=(RowError(line=4, reason="no label"),), total=1)
    FileStore(service.store, "default").refuse(file.id, errors)
    with pytest.raises(sdk.BadRequestError, match="line 4: no label"):
        await create(openai, file.id)


@pytest.mark.parametrize("job_id", ["ftjob-none", "ingest-file-1", "..%2f", "A", "a" * 64])
async def test_unknown_jobs(http: httpx.AsyncClient, job_id: str):
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events"),
                         ("GET", "/events?stream=true")):  # fmt: skip
        response = await http.request(method, f"/v1/fine_tuning/jobs/{job_id}{path}")
        assert response.status_code in (400, 404)
        assert response.json()["error"]["message"]


async def test_an_ingest_job_is_not_a_fine_tuning_job(openai: AsyncOpenAI):
    file = await openai.files.create(file=("a.csv", b"x"), purpose="fine-tune")
    with pytest.raises(sdk.NotFoundError):
        await openai.fine_tuning.jobs.retrieve(ingest_job_id(file.id))
