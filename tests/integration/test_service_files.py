"""`/v1/files` through the official client, with a worker played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import httpx
import openai as sdk
import pytest

from core.datasets import DatasetManifest, FileErrors, Modality, RowError
from core.files import FileStore
from core.jobs import Failure, JobKind, JobStatus
from service.api.files import ingest_job_id

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from tests.integration.service_process import FakeWorker, ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]

CSV = b"text,label\nhello,greeting\nbye,parting\n"
MANIFEST = DatasetManifest(
    modality=Modality.TEXT, rows=2, counts={"greeting": 1, "parting": 1}, sha256="0" * 64
)


async def upload(openai: AsyncOpenAI, data: bytes = CSV, name: str = "a.csv") -> str:
    file = await openai.files.create(file=(name, data), purpose="fine-tune")
    return file.id


def stored(service: ServiceProcess) -> FileStore:
    return FileStore(service.store, "default")


async def test_a_file_goes_in_and_comes_out(openai: AsyncOpenAI):
    file = await openai.files.create(file=("train set.csv", CSV), purpose="fine-tune")
    assert (file.object, file.status, file.bytes) == ("file", "uploaded", len(CSV))
    assert (file.filename, file.purpose) == ("train set.csv", "fine-tune")
    assert await openai.files.retrieve(file.id) == file
    assert (await openai.files.content(file.id)).content == CSV
    assert file.id in [each.id async for each in openai.files.list()]


async def test_a_large_file_is_the_same_when_it_comes_back(openai: AsyncOpenAI):
    data = bytes(range(256)) * 25_000
    file_id = await upload(openai, data)
    assert (await openai.files.content(file_id)).content == data


async def test_a_file_is_deleted_whole(openai: AsyncOpenAI, service: ServiceProcess):
    file_id = await upload(openai)
    deleted = await openai.files.delete(file_id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file_id, True, "file")
    for call in (openai.files.retrieve, openai.files.content, openai.files.delete):
        with pytest.raises(sdk.NotFoundError) as refused:
            await call(file_id)
        assert refused.value.code == "not_found"
    assert list(service.store.walk(f"default/files/{file_id}")) == []


async def test_a_parsed_file_is_processed(
    openai: AsyncOpenAI, service: ServiceProcess, worker: FakeWorker
):
    file_id = await upload(openai)

    async def parse() -> None:
        claim = await worker.claim(ingest_job_id(file_id), JobKind.INGEST)
        assert claim.job.spec == {"file": file_id}
        stored(service).accept(file_id, b"parquet", MANIFEST)
        await worker.queue.settle(claim, JobStatus.SUCCEEDED)

    waiting = openai.files.wait_for_processing(file_id, poll_interval=0.05, max_wait_seconds=10)
    file, _ = await asyncio.gather(waiting, parse())
    assert file.status == "processed"
    assert file.dataset == {  # type: ignore[attr-defined]
        "modality": "text", "task": "single_label",
        "rows": 2, "classes": 2, "counts": MANIFEST.counts,
    }  # fmt: skip


async def test_a_bad_file_says_where_and_why(
    openai: AsyncOpenAI, service: ServiceProcess, worker: FakeWorker
):
    file_id = await upload(openai)
    errors = FileErrors(errors=(RowError(line=2, column="label", reason="is empty"),), total=1)
    stored(service).refuse(file_id, errors)
    file = await openai.files.retrieve(file_id)
    assert (file.status, file.status_details) == ("error", "line 2, column 'label': is empty")
    assert file.errors[0]["line"] == 2  # type: ignore[attr-defined]


async def test_a_parser_that_failed_is_told_as_the_files_error(
    openai: AsyncOpenAI, worker: FakeWorker
):
    file_id = await upload(openai)
    failure = Failure(code="out_of_memory", message="The file takes too much memory.")
    await worker.settle(
        ingest_job_id(file_id), JobStatus.FAILED, kind=JobKind.INGEST, error=failure
    )
    file = await openai.files.retrieve(file_id)
    assert (file.status, file.status_details) == ("error", failure.message)


async def test_lists_page_in_both_directions(openai: AsyncOpenAI, http: httpx.AsyncClient):
    ids = [await upload(openai, name=f"{n}.csv") for n in range(5)]
    newest = [each.id async for each in openai.files.list(limit=2)]
    assert newest[:5] == ids[::-1]
    oldest = [each.id async for each in openai.files.list(limit=2, order="asc")]
    assert oldest == newest[::-1]
    page = (await http.get("/v1/files", params={"limit": 2, "after": ids[4]})).json()
    assert [each["id"] for each in page["data"]] == [ids[3], ids[2]]
    assert page["has_more"] is True
    assert [each async for each in openai.files.list(purpose="batch")] == []
    for params in ({"after": "file-none"}, {"limit": 0}, {"limit": 10_001}, {"limit": "x"}):
        assert (await http.get("/v1/files", params=params)).status_code == 400


async def test_a_file_in_use_stays(openai: AsyncOpenAI, worker: FakeWorker):
    file_id, other = await upload(openai), await upload(openai)
    job = await openai.fine_tuning.jobs.create(
        model="minilm", training_file=file_id, validation_file=other
    )
    for each in (file_id, other):
        with pytest.raises(sdk.ConflictError, match=job.id):
            await openai.files.delete(each)
    await openai.fine_tuning.jobs.cancel(job.id)
    for each in (file_id, other):
        assert (await openai.files.delete(each)).deleted


FORMS: list[tuple[dict[str, object], int]] = [
    ({"files": {"file": ("a.csv", b"")}}, 400),
    ({"files": {"file": ("a.csv", CSV)}, "data": {"purpose": "assistants"}}, 400),
    ({"files": {"upload": ("a.csv", CSV)}}, 400),
    ({"files": [("file", ("a", b"1")), ("file", ("b", b"2"))]}, 400),
    ({"data": {"purpose": "fine-tune"}}, 415),
    ({"json": {"file": "x"}}, 415),
    ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 415),
    ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400),
    ({"content": b"--b\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400),
    ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=" + "b" * 300}},
     415),
    ({"files": {"file": ("a.csv", b"x" * 8_000_001)}}, 413),
    ({"files": {"file": ("a.csv", b"x" * 12_000_000)}}, 413),
]  # fmt: skip


@pytest.mark.parametrize(("form", "status"), FORMS)
async def test_a_bad_form_leaves_nothing(
    http: httpx.AsyncClient, service: ServiceProcess, form: dict[str, object], status: int
):
    def objects() -> set[str]:
        return {entry.key for entry in service.store.walk("default/files")}

    before = objects()
    response = await http.post("/v1/files", **form)  # type: ignore[arg-type]
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert objects() == before


async def test_a_caller_that_goes_away_leaves_nothing(
    http: httpx.AsyncClient, service: ServiceProcess
):
    def objects() -> set[str]:
        return {entry.key for entry in service.store.walk("default/files")}

    before = objects()

    async def half() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield b"x" * 6_000_000
        raise ConnectionError("the caller's cable is pulled")

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with pytest.raises(ConnectionError):
        await http.post("/v1/files", content=half(), headers=headers)
    assert (await http.get("/livez")).status_code == 200
    assert objects() == before


@pytest.mark.parametrize("file_id", ["nothing", "..%2f..%2fetc", "A", "%00", "a" * 64, "file-1%0a"])
async def test_no_odd_id_is_more_than_an_error(http: httpx.AsyncClient, file_id: str):
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        response = await http.request(method, f"/v1/files/{file_id}{path}")
        assert response.status_code in (400, 404)
        assert response.json()["error"]["message"]
