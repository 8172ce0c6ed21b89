"""Making a job once: idempotency keys, the official client's retries, dry runs, and the filter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import openai as sdk
import pytest
from openai import AsyncOpenAI

from core.datasets import DatasetManifest, FileErrors, Modality, RowError
from core.files import FileStore
from core.jobs import JobStatus

if TYPE_CHECKING:
    from tests.integration.service_process import FakeWorker, ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]

JOBS = "/v1/fine_tuning/jobs"
TEXT = DatasetManifest(modality=Modality.TEXT, rows=5, counts={"a": 2, "b": 3}, sha256="0")
OTHER = DatasetManifest(modality=Modality.TEXT, rows=2, counts={"a": 1, "z": 1}, sha256="0")
IMAGES = DatasetManifest(modality=Modality.IMAGE, rows=4, counts={"a": 2, "b": 2}, sha256="0")
AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}


class Uploads:
    """Makes files with the outcome that a test wants."""

    def __init__(self, openai: AsyncOpenAI, service: ServiceProcess) -> None:
        self._openai = openai
        self._files = FileStore(service.store, "default")

    async def add(self, outcome: DatasetManifest | FileErrors | None = None) -> str:
        file = await self._openai.files.create(file=("a.csv", b"x"), purpose="fine-tune")
        if isinstance(outcome, FileErrors):
            self._files.refuse(file.id, outcome)
        elif outcome is not None:
            self._files.accept(file.id, b"parquet", outcome)
        return file.id


@pytest.fixture
def uploads(openai: AsyncOpenAI, service: ServiceProcess) -> Uploads:
    return Uploads(openai, service)


@pytest.fixture
async def body(uploads: Uploads) -> dict[str, Any]:
    """A request that nobody made before."""
    return {"model": "minilm", "training_file": await uploads.add(TEXT)}


async def jobs_of(openai: AsyncOpenAI, body: dict[str, Any]) -> list[str]:
    """The jobs that were made for the request's file, newest first."""
    listed = openai.fine_tuning.jobs.list(limit=100)
    return [job.id async for job in listed if job.training_file == body["training_file"]]


async def post(
    http: httpx.AsyncClient, body: dict[str, Any], key: str | None = None, **headers: str
) -> httpx.Response:
    if key is not None:
        headers["Idempotency-Key"] = key
    return await http.post(JOBS, json=body, headers=headers)


class TestKey:
    async def test_the_same_request_gets_the_same_job(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, worker: FakeWorker, body: dict[str, Any]
    ):
        key = f"key of {body['training_file']}"
        first = await post(http, body, key)
        reordered = dict(reversed(body.items()))
        again = await post(http, reordered, key)
        assert (first.status_code, again.status_code) == (200, 200)
        assert again.json()["id"] == first.json()["id"]
        assert "Idempotent-Replayed" not in first.headers
        assert again.headers["Idempotent-Replayed"] == "true"
        await worker.settle(first.json()["id"], JobStatus.SUCCEEDED)
        assert (await post(http, body, key)).json()["status"] == "succeeded"
        assert await jobs_of(openai, body) == [first.json()["id"]]

    async def test_many_at_once_make_one_job(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        key = body["training_file"]
        answers = await asyncio.gather(*(post(http, body, key) for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert len(await jobs_of(openai, body)) == 1

    async def test_another_body_is_refused(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        key = body["training_file"]
        await post(http, body, key)
        response = await post(http, body | {"seed": 1}, key)
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "idempotency_key_reused"
        with pytest.raises(sdk.ConflictError):
            await openai.fine_tuning.jobs.create(
                **body, seed=2, extra_headers={"Idempotency-Key": key}
            )
        assert len(await jobs_of(openai, body)) == 1

    async def test_a_refused_request_leaves_the_key_free(
        self, http: httpx.AsyncClient, body: dict[str, Any]
    ):
        key = body["training_file"]
        assert (await post(http, body | {"model": "gpt-4o"}, key)).status_code == 400
        assert (await post(http, body, key)).status_code == 200

    async def test_a_repeat_is_answered_when_the_file_is_gone(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, worker: FakeWorker, body: dict[str, Any]
    ):
        key = body["training_file"]
        first = (await post(http, body, key)).json()["id"]
        await worker.settle(first, JobStatus.SUCCEEDED)
        await openai.files.delete(body["training_file"])
        assert (await post(http, body, key)).json()["id"] == first

    @pytest.mark.parametrize("key", [b"", b"k" * 256, b"caf\xe9", b"tab\there"])
    async def test_a_key_that_is_none(
        self, http: httpx.AsyncClient, body: dict[str, Any], key: bytes
    ):
        response = await http.post(JOBS, json=body, headers=[(b"Idempotency-Key", key)])
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("Idempotency-Key", "invalid_idempotency_key")

    async def test_two_keys_are_none(self, http: httpx.AsyncClient, body: dict[str, Any]):
        headers = [(b"Idempotency-Key", b"a"), (b"Idempotency-Key", b"b")]
        assert (await http.post(JOBS, json=body, headers=headers)).status_code == 400

    @pytest.mark.parametrize("key", ["k", "~" * 255, 'with "quotes" and spaces: {}'])
    async def test_a_key_may_be_any_printable_text(
        self, http: httpx.AsyncClient, body: dict[str, Any], key: str
    ):
        first = await post(http, body, key)
        assert first.status_code == 200
        assert (await post(http, body, key)).json()["id"] == first.json()["id"]


class LosingProxy:
    """Passes connections on, but closes the first `losses` when the answer to a POST begins.

    The service has done the work then, and the client cannot know.
    """

    def __init__(self, url: str, losses: int) -> None:
        self.losses = losses
        self.lost = 0
        self.connections: list[asyncio.Task[None]] = []
        self._port = urlsplit(url).port

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        sending = asyncio.create_task(self._forward(reader, back))
        try:
            while data := await there.read(65536):
                if self.lost < self.losses:
                    self.lost += 1
                    return
                writer.write(data)
                await writer.drain()
        finally:
            sending.cancel()
            for end in (writer, back):
                end.close()
                with suppress(ConnectionError):
                    await end.wait_closed()

    @staticmethod
    async def _forward(reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            back.write(data)
            await back.drain()


@asynccontextmanager
async def behind_a_proxy(
    service: ServiceProcess, losses: int
) -> AsyncIterator[tuple[AsyncOpenAI, LosingProxy]]:
    proxy = LosingProxy(service.url, losses)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    async with server:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=3) as client:
            yield client, proxy
        for connection in proxy.connections:
            connection.cancel()
        await asyncio.gather(*proxy.connections, return_exceptions=True)


class TestRetry:
    @pytest.mark.parametrize("losses", [1, 3])
    async def test_the_clients_own_retries_make_one_job(
        self, service: ServiceProcess, openai: AsyncOpenAI, body: dict[str, Any], losses: int
    ):
        async with behind_a_proxy(service, losses) as (client, proxy):
            job = await client.fine_tuning.jobs.create(**body, suffix="support")
        assert proxy.lost == losses
        assert await jobs_of(openai, body) == [job.id]

    async def test_a_person_who_asks_twice_gets_two_jobs(
        self, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        first, second = [await openai.fine_tuning.jobs.create(**body) for _ in range(2)]
        assert await jobs_of(openai, body) == [second.id, first.id]

    async def test_a_retry_of_another_request_makes_a_job(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        await post(http, body)
        await post(http, body | {"seed": 1}, **{"x-stainless-retry-count": "1"})
        assert len(await jobs_of(openai, body)) == 2

    @pytest.mark.parametrize("count", ["0", "", "x", "-1", "²"])
    async def test_what_is_no_retry_makes_a_job(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, body: dict[str, Any], count: str
    ):
        for _ in range(2):
            headers = [(b"x-stainless-retry-count", count.encode("latin-1"))]
            response = await http.post(JOBS, json=body, headers=headers)
            assert response.status_code == 200
        assert len(await jobs_of(openai, body)) == 2

    async def test_a_retry_gets_its_job_through_any_process(
        self, service: ServiceProcess, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        async with service.one_client_per_process() as clients:
            one, two = clients.values()
            first = await post(one, body)
            again = await post(two, body, **{"x-stainless-retry-count": "1"})
        assert again.json()["id"] == first.json()["id"]
        assert again.headers["Idempotent-Replayed"] == "true"

    async def test_a_key_goes_before_the_retry_count(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        first = (await post(http, body, body["training_file"])).json()["id"]
        count = {"x-stainless-retry-count": "1"}
        other = (await post(http, body, body["training_file"] + "2", **count)).json()["id"]
        assert await jobs_of(openai, body) == [other, first]


class TestFilter:
    async def test_by_metadata_in_pages(self, openai: AsyncOpenAI, body: dict[str, Any]):
        team = body["training_file"]
        made: dict[str, list[str]] = {"blue": [], "red": []}
        for n in range(7):
            colour = "red" if n % 3 == 1 else "blue"
            job = await openai.fine_tuning.jobs.create(
                **body, metadata={"team": team, "colour": colour, "an [odd]=&key": "é"}
            )
            made[colour].insert(0, job.id)
        jobs = openai.fine_tuning.jobs
        for limit in (1, 2, 5, 20):
            listed = jobs.list(metadata={"team": team, "colour": "blue"}, limit=limit)
            assert [job.id async for job in listed] == made["blue"]
        page = await jobs.list(metadata={"team": team, "colour": "red"}, limit=2)
        assert ([job.id for job in page.data], page.has_more) == (made["red"], False)
        page = await jobs.list(metadata={"team": team, "colour": "blue"}, limit=4)
        assert (len(page.data), page.has_more) == (4, True)
        assert len((await jobs.list(metadata={"an [odd]=&key": "é", "team": team})).data) == 7
        assert (await jobs.list(metadata={"team": team, "colour": "green"})).data == []
        assert (await jobs.list(metadata={"team": team, "none": ""})).data == []

    async def test_the_scan_goes_beyond_a_page_of_others(
        self, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        team = body["training_file"]
        wanted = await openai.fine_tuning.jobs.create(**body, metadata={"team": team})
        await asyncio.gather(*(openai.fine_tuning.jobs.create(**body) for _ in range(250)))
        page = await openai.fine_tuning.jobs.list(metadata={"team": team}, limit=1)
        assert ([job.id for job in page.data], page.has_more) == ([wanted.id], False)

    async def test_jobs_without_metadata(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        plain = await openai.fine_tuning.jobs.create(**body)
        await openai.fine_tuning.jobs.create(**body, metadata={"team": "blue"})
        found = (await http.get(JOBS, params={"metadata": "null", "limit": "1"})).json()
        assert [job["id"] for job in found["data"]] == [plain.id]

    @pytest.mark.parametrize(
        "query",
        ["metadata=x", "metadata[]=x", "metadata[a=x", f"metadata[{'k' * 65}]=v",
         f"metadata[k]={'v' * 513}", "metadata[a]=1&metadata[a]=2",
         "metadata=null&metadata[a]=1", "&".join(f"metadata[{n}]=v" for n in range(17))],
    )  # fmt: skip
    async def test_a_filter_that_is_none(self, http: httpx.AsyncClient, query: str):
        response = await http.get(f"{JOBS}?{query}")
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "metadata"


async def dry_run(http: httpx.AsyncClient, body: Any) -> httpx.Response:
    return await http.post(JOBS, params={"dry_run": "true"}, json=body)


class TestDryRun:
    async def test_says_what_would_be_done_and_does_not(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, uploads: Uploads, body: dict[str, Any]
    ):
        held_out = await uploads.add(TEXT)
        method = {"type": "supervised", "supervised": {"hyperparameters": AUTO}}
        response = await dry_run(http, body | {"validation_file": held_out, "method": method})
        assert response.status_code == 200
        found = response.json()
        assert found["object"] == "fine_tuning.job.dry_run"
        assert found["training_file"] == {
            "id": body["training_file"],
            "status": "processed",
            "dataset": {
                "modality": "text",
                "task": "single_label",
                "rows": 5,
                "classes": 2,
                "counts": {"a": 2, "b": 3},
            },
        }
        assert found["validation_file"]["id"] == held_out
        assert found["waits_for_files"] is False
        resolved = found["resolved"]
        assert resolved["model"] == "minilm"
        assert (resolved["strategy"], resolved["precision"]) == ("feature_extraction", "fp32")
        assert "auto" not in str(resolved)
        assert resolved["hyperparameters"] == dict.fromkeys(AUTO)
        estimate = found["estimate"]
        assert 0 < estimate["seconds"] < 60
        tuned = (await dry_run(http, body | {"strategy": "gradual"})).json()["estimate"]
        assert tuned["seconds"] > tuned["unfreeze_seconds"] > estimate["seconds"]
        assert 1e8 < estimate["memory_bytes"] < 4e9
        whole = (await dry_run(http, body | {"strategy": "full", "precision": "auto"})).json()
        assert (whole["resolved"]["precision"], whole["resolved"]["ignored"]) == ("fp32", [])
        assert whole["estimate"]["memory_bytes"] > estimate["memory_bytes"]
        assert await jobs_of(openai, body) == []

    async def test_the_precision_is_measured_or_refused_by_backbone(
        self, http: httpx.AsyncClient, body: dict[str, Any]
    ):
        answer = (await dry_run(http, body | {"model": "auto", "strategy": "auto"})).json()
        # Which backbone suits the data, and what tuning may gain, only the job can tell.
        resolved = answer["resolved"]
        assert (resolved["model"], resolved["measured"]) == ("auto", ["model", "strategy"])
        assert answer["estimate"] is None
        answer = (await dry_run(http, body | {"precision": "auto"})).json()["resolved"]
        assert (answer["precision"], answer["measured"]) == ("auto", ["precision"])
        image = body | {"model": "efficientnet-lite0", "precision": "int8"}
        for response in (await http.post(JOBS, json=image), await dry_run(http, image)):
            assert response.status_code == 400
            assert "precision" in response.text
            assert "no linear layers" in response.text
        assert (await http.post(JOBS, json=image)).json()["error"]["param"] == "precision"

    async def test_leaves_keys_and_retries_alone(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        key = body["training_file"]
        await http.post(f"{JOBS}?dry_run=true", json=body, headers={"Idempotency-Key": key})
        assert (await post(http, body | {"seed": 1}, key)).status_code == 200

    async def test_more_rows_take_longer_and_images_longer_still(
        self, http: httpx.AsyncClient, uploads: Uploads, body: dict[str, Any]
    ):
        def big(modality: Modality) -> DatasetManifest:
            counts = {"a": 5000, "b": 5000}
            return DatasetManifest(modality=modality, rows=10_000, counts=counts, sha256="0")

        seconds = []
        for model, file in (
            ("wordllama", body["training_file"]),
            ("wordllama", text := await uploads.add(big(Modality.TEXT))),
            ("minilm", text),
            ("mobilenet-v2", image := await uploads.add(big(Modality.IMAGE))),
            ("efficientnet-lite0", image),
        ):
            found = await dry_run(http, {"model": model, "training_file": file})
            seconds.append(found.json()["estimate"]["seconds"])
        assert seconds == sorted(seconds)
        assert len(set(seconds)) == len(seconds)

    async def test_a_file_that_is_not_parsed_yet(self, http: httpx.AsyncClient, uploads: Uploads):
        file_id = await uploads.add()
        found = (await dry_run(http, {"model": "minilm", "training_file": file_id})).json()
        assert found["training_file"] == {"id": file_id, "status": "uploaded", "dataset": None}
        assert found["waits_for_files"] is True
        assert found["estimate"] is None

    async def test_hyperparameters_that_a_convex_fit_has_no_use_for(
        self, http: httpx.AsyncClient, body: dict[str, Any]
    ):
        found = (await dry_run(http, body | {"hyperparameters": {"n_epochs": 4}})).json()
        assert found["resolved"]["hyperparameters"]["n_epochs"] is None
        assert found["resolved"]["ignored"] == ["n_epochs"]

    async def test_every_error_is_named(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, uploads: Uploads
    ):
        rows = (
            RowError(line=4, column="label", reason="no label"),
            RowError(line=9, column="text", reason="too long"),
        )
        file_id = await uploads.add(FileErrors(errors=rows, total=7))
        response = await dry_run(
            http,
            {"model": "gpt-4o", "training_file": file_id, "validation_file": "file-none",
             "suffix": "minilm", "seed": -1, "priority": 101},
        )  # fmt: skip
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["error_count"] == 5 + 7
        found = error["errors"]
        assert {one["param"] for one in found} == {
            "model", "training_file", "validation_file", "suffix", "seed", "priority",
        }  # fmt: skip
        assert [
            (one["line"], one["column"], one["message"])
            for one in found
            if one["param"] == "training_file"
        ] == [(4, "label", "no label"), (9, "text", "too long")]
        codes = {one["param"]: one["code"] for one in found}
        assert codes["model"] == "model_not_found"
        assert codes["validation_file"] == "file_not_found"
        assert error["param"] == found[0]["param"]

    async def test_what_the_worker_would_find(
        self, http: httpx.AsyncClient, uploads: Uploads, body: dict[str, Any]
    ):
        async def errors(**change: Any) -> list[tuple[str, str]]:
            response = await dry_run(http, body | change)
            assert response.status_code == 400
            return [(e["param"], e["code"]) for e in response.json()["error"]["errors"]]

        images, other = await uploads.add(IMAGES), await uploads.add(OTHER)
        assert await errors(training_file=images) == [("model", "data_error")]
        assert await errors(model="efficientnet-lite0") == [("model", "data_error")]
        assert await errors(validation_file=images) == [("validation_file", "data_error")]
        assert await errors(validation_file=other) == [("validation_file", "data_error")]

    @pytest.mark.parametrize("body", [[], "x", {}, {"training_file": 1, "model": ["x"]}])
    async def test_bodies_that_are_none(self, http: httpx.AsyncClient, body: Any):
        response = await dry_run(http, body)
        assert response.status_code == 400
        assert response.json()["error"]["errors"]

    async def test_dry_run_is_true_or_false(
        self, http: httpx.AsyncClient, openai: AsyncOpenAI, body: dict[str, Any]
    ):
        response = await http.post(JOBS, params={"dry_run": "maybe"}, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "dry_run"
        assert await jobs_of(openai, body) == []
        await http.post(JOBS, params={"dry_run": "false"}, json=body)
        assert len(await jobs_of(openai, body)) == 1


@pytest.mark.parametrize("model", ["pets", "pets@1", "pets:production"])
async def test_a_job_continues_the_version_that_is_meant_now(
    openai: AsyncOpenAI, uploads: Uploads, model: str
) -> None:
    job = await openai.fine_tuning.jobs.create(model=model, training_file=await uploads.add(TEXT))
    assert (job.model, job.suffix) == ("pets@1", "pets")  # type: ignore[attr-defined]


async def test_a_continued_job_may_have_a_name_of_its_own(
    openai: AsyncOpenAI, uploads: Uploads
) -> None:
    job = await openai.fine_tuning.jobs.create(
        model="pets@1", training_file=await uploads.add(TEXT), suffix="pets-two"
    )
    assert job.suffix == "pets-two"  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["nobody", "pets@7", "pets:nowhere", "Not A Model", "hf:x/y@1"])
async def test_a_model_that_is_not_there_cannot_be_continued(
    http: httpx.AsyncClient, uploads: Uploads, model: str
) -> None:
    body = {"model": model, "training_file": await uploads.add(TEXT)}
    for params in ({}, {"dry_run": "true"}):
        response = await http.post(JOBS, params=params, json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")


async def test_a_dry_run_tells_what_is_continued(http: httpx.AsyncClient, uploads: Uploads) -> None:
    body = {"model": "pets", "training_file": await uploads.add(TEXT)}
    found = (await dry_run(http, body)).json()
    assert found["continues"] == {"model": "pets@1", "rows": 8}
    assert (found["resolved"]["model"], found["resolved"]["suffix"]) == ("pets@1", "pets")
    refused = await dry_run(http, body | {"training_file": await uploads.add(IMAGES)})
    assert refused.json()["error"]["param"] == "model"
