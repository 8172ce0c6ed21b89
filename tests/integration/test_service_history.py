"""Redis forgets: finished jobs stay, uploads are parsed all the same, and models are served."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import httpx
import openai as sdk
import pytest

from core.datasets import DatasetManifest, Modality
from core.files import FileStore
from core.jobs import JobKind, JobStatus
from core.queue.connection import connect
from core.runs import RunStore
from service.api.files import ingest_job_id
from service.job_history import INDEX_SECONDS
from tests.builders import add_text_trunk, publish
from training.archive import archive_finished

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from tests.integration.service_process import FakeWorker, ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]

MANIFEST = DatasetManifest(modality=Modality.TEXT, rows=2, counts={"a": 1, "b": 1}, sha256="0")


async def forget(service: ServiceProcess) -> None:
    """Empty Redis of all that is this service's."""
    client = connect(service.redis.url)
    keys = [key async for key in client.scan_iter(f"{service.prefix}:*")]
    await client.delete(*keys)
    await client.aclose()


async def archive(service: ServiceProcess, worker: FakeWorker) -> None:
    assert await archive_finished(worker.queue, RunStore(service.store)) is False


async def finished_job(
    openai: AsyncOpenAI, service: ServiceProcess, worker: FakeWorker, name: str
) -> str:
    file = await openai.files.create(file=("a.csv", b"text,label\na,b\n"), purpose="fine-tune")
    FileStore(service.store, "default").accept(file.id, b"parquet", MANIFEST)
    job = await openai.fine_tuning.jobs.create(
        model="minilm", training_file=file.id, suffix=name, metadata={"name": name}
    )
    claim = await worker.claim(job.id)
    await worker.queue.append_event(claim, "metrics", "measured", data={"accuracy": 0.9})
    result = {"fine_tuned_model": f"{name}@1", "metrics": {"accuracy": 0.9}}
    await worker.queue.settle(claim, JobStatus.SUCCEEDED, result=result)
    return job.id


async def streamed(http: httpx.AsyncClient, job_id: str, **headers: str) -> str:
    path = f"/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    async with asyncio.timeout(5):
        return (await http.get(path, headers=headers)).text


async def test_finished_job_is_answered_alike_without_redis(
    openai: AsyncOpenAI, http: httpx.AsyncClient, service: ServiceProcess, worker: FakeWorker
):
    job_id = await finished_job(openai, service, worker, "kept")
    path = f"/v1/fine_tuning/jobs/{job_id}"

    async def answers() -> list[object]:
        job = (await http.get(path)).json()
        assert job["report"] in job["result_files"]
        contents = [
            (await http.get(f"/v1/files/{id}{rest}")).text
            for id in job["result_files"]
            for rest in ("", "/content")
        ]
        first = (await http.get(f"{path}/events?limit=2")).json()
        assert first["has_more"]
        after = first["data"][-1]["id"]
        rest = (await http.get(f"{path}/events?after={after}")).json()
        whole = await streamed(http, job_id)
        resumed = await streamed(http, job_id, **{"Last-Event-ID": after})
        end = await streamed(http, job_id, **{"Last-Event-ID": first["data"][0]["id"]})
        return [job, contents, first, rest, whole, resumed, end]

    before = await answers()
    await archive(service, worker)
    assert await answers() == before
    await forget(service)
    assert await answers() == before
    assert "event: succeeded" in str(before[4])
    assert before[6] == ""
    with pytest.raises(sdk.ConflictError, match="already succeeded"):
        await openai.fine_tuning.jobs.cancel(job_id)


async def test_result_files_are_read_and_nothing_else(
    openai: AsyncOpenAI, http: httpx.AsyncClient, service: ServiceProcess, worker: FakeWorker
):
    job_id = await finished_job(openai, service, worker, "results")
    job = await openai.fine_tuning.jobs.retrieve(job_id)
    report = await openai.files.retrieve(job.report)  # type: ignore[attr-defined]
    assert (report.purpose, report.status) == ("fine-tune-results", "processed")
    content = (await openai.files.content(report.id)).content
    assert len(content) == report.bytes
    assert json.loads(content)["job"] == job_id
    page = await http.get(f"/v1/files/{job.report_html}/content")  # type: ignore[attr-defined]
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["x-content-type-options"] == "nosniff"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert policy.endswith("sandbox")
    metrics = next(id for id in job.result_files if id != report.id)
    lines = (await openai.files.content(metrics)).text.splitlines()
    assert lines[0] == "created_at,accuracy"
    assert lines[1].endswith(",0.9")
    with pytest.raises(sdk.ConflictError):
        await openai.files.delete(report.id)
    with pytest.raises(sdk.BadRequestError):
        await openai.fine_tuning.jobs.create(model="minilm", training_file=report.id)
    assert report.id not in [file.id async for file in openai.files.list()]
    for id in ("file-report-ftjob-none", "file-metrics-x", "file-report-"):
        assert (await http.get(f"/v1/files/{id}")).status_code == 404


async def test_list_goes_on_where_redis_ends(
    openai: AsyncOpenAI, service: ServiceProcess, worker: FakeWorker
):
    old = [await finished_job(openai, service, worker, f"old-{n}") for n in range(3)]
    await archive(service, worker)
    await forget(service)
    new = [await finished_job(openai, service, worker, f"new-{n}") for n in range(2)]
    expected = [*reversed(new), *reversed(old)]
    async with asyncio.timeout(INDEX_SECONDS + 10):
        while (found := [job.id async for job in openai.fine_tuning.jobs.list(limit=2)])[
            :5
        ] != expected:
            await asyncio.sleep(0.1)
    assert len(found) == len(set(found))
    page = await openai.fine_tuning.jobs.list(limit=1, after=old[1])
    assert [job.id for job in page.data] == [old[0]]


async def test_upload_that_redis_forgot_is_parsed_all_the_same(
    openai: AsyncOpenAI, service: ServiceProcess, worker: FakeWorker
):
    file = await openai.files.create(file=("a.csv", b"x"), purpose="fine-tune")
    await forget(service)
    waiting = asyncio.create_task(
        openai.files.wait_for_processing(file.id, poll_interval=0.05, max_wait_seconds=10)
    )
    claim = await worker.claim(ingest_job_id(file.id), JobKind.INGEST)
    FileStore(service.store, "default").accept(file.id, b"parquet", MANIFEST)
    await worker.queue.settle(claim, JobStatus.SUCCEEDED)
    assert (await waiting).status == "processed"


async def test_models_are_served_and_new_ones_found(
    http: httpx.AsyncClient, service: ServiceProcess
):
    await forget(service)
    body = {"model": "pets", "inputs": ["cat"]}
    assert (await http.post("/v1/predict", json=body)).status_code == 200
    publish(service.registry, add_text_trunk(service.registry), "afterwards")
    async with asyncio.timeout(10):
        while (
            await http.post("/v1/predict", json={"model": "afterwards", "inputs": ["cat"]})
        ).status_code != 200:
            await asyncio.sleep(0.1)
