"""Models that come, move and go while the service answers others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai as sdk
import pytest

from core.backbones import BACKBONES
from core.changes import Change
from core.manifests import ModelManifest, TrunkManifest
from core.registry import Registry
from core.store import ArtifactStore
from tests.builders import TENANT, add_text_trunk, head_files, publish

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from tests.integration.service_process import FakeWorker, ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]

EVENT_SECONDS = 1.0
POLL_SECONDS = 2.0
MENDED = f"{TENANT}/models/mended"


@pytest.fixture
def trunk(service: ServiceProcess) -> TrunkManifest:
    return add_text_trunk(service.registry)


async def tell(worker: FakeWorker, manifest: ModelManifest) -> None:
    change = Change(tenant=TENANT, model=manifest.name, type="published", version=manifest.version)
    await worker.feed.publish(change)


async def answers(http: httpx.AsyncClient, model: str) -> str | None:
    response = await http.post("/v1/predict", json={"model": model, "inputs": ["good cat"]})
    return str(response.json()["model"]) if response.status_code == 200 else None


async def until_all_answer(
    processes: dict[int, httpx.AsyncClient], model: str, expected: str | None
) -> dict[int, float]:
    """Wait until each process answers with `expected`; return how long each took, in seconds."""
    began = time.monotonic()
    took: dict[int, float] = {}
    async with asyncio.timeout(15):
        while len(took) < len(processes):
            for pid, client in processes.items():
                if pid not in took and await answers(client, model) == expected:
                    took[pid] = time.monotonic() - began
            await asyncio.sleep(0.01)
    return took


@asynccontextmanager
async def light_load(service: ServiceProcess) -> AsyncIterator[list[int]]:
    """Predict with another model all the while; every answer must be a 200."""
    statuses: list[int] = []

    async def ask() -> None:
        async with service.http() as client:
            while True:
                body = {"model": "other", "inputs": ["bad dog"]}
                statuses.append((await client.post("/v1/predict", json=body)).status_code)

    tasks = [asyncio.create_task(ask()) for _ in range(2)]
    try:
        yield statuses
    finally:
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert len(statuses) > 10
    assert set(statuses) == {200}


async def test_a_new_version_is_served_by_every_process_at_once_and_nobody_else_notices(
    service: ServiceProcess, worker: FakeWorker, trunk: TrunkManifest
):
    async with light_load(service), service.one_client_per_process() as processes:
        assert len(processes) == 2
        for version in (1, 2, 3):
            manifest = publish(service.registry, trunk, "fresh", seed=version)
            await tell(worker, manifest)
            took = await until_all_answer(processes, "fresh", f"fresh@{version}")
            assert max(took.values()) < EVENT_SECONDS


async def test_a_lost_event_costs_a_poll(service: ServiceProcess, trunk: TrunkManifest):
    async with service.one_client_per_process() as processes:
        publish(service.registry, trunk, "unheard-of")
        took = await until_all_answer(processes, "unheard-of", "unheard-of@1")
        assert max(took.values()) < 2 * POLL_SECONDS


async def test_a_bad_version_is_refused_and_the_old_one_serves_on(
    service: ServiceProcess, worker: FakeWorker, openai: AsyncOpenAI, trunk: TrunkManifest
):
    publish(service.registry, trunk, "sound")
    async with light_load(service), service.one_client_per_process() as processes:
        await until_all_answer(processes, "sound", "sound@1")
        bad = head_files(4) | {"head.onnx": b"not a graph"}
        await tell(worker, publish(service.registry, trunk, "sound", files=bad))
        async with asyncio.timeout(10):
            while (model := await openai.models.retrieve("sound@2")).refused is None:  # type: ignore[attr-defined]
                await asyncio.sleep(0.02)
        assert model.served is False  # type: ignore[attr-defined]
        for client in processes.values():
            async with asyncio.timeout(10):
                while True:
                    body = {"model": "sound@2", "inputs": ["cat"]}
                    response = await client.post("/v1/predict", json=body)
                    if response.status_code == 503:
                        break
                    await asyncio.sleep(0.02)
            assert "sound@2" in response.json()["error"]["message"]
            assert response.json()["error"]["code"] == "version_refused"
            assert "Retry-After" not in response.headers
            assert await answers(client, "sound") == "sound@1"


async def test_pages_of_models_hold_what_is_there_now_and_nothing_else(
    service: ServiceProcess, http: httpx.AsyncClient, trunk: TrunkManifest
):
    for name in ("page-a", "page-b", "page-c"):
        publish(service.registry, trunk, name)
    async with asyncio.timeout(15):
        while await answers(http, "page-b") is None:
            await asyncio.sleep(0.02)
    assert (await http.delete("/v1/models/page-b")).status_code == 200
    publish(service.registry, trunk, "page-d")  # of which no process has heard
    names: list[str] = []
    pages = 0
    has_more = True
    while has_more:
        after = names[-1] if names else "page-"
        page = (await http.get("/v1/models", params={"limit": 1, "after": after})).json()
        names += [model["id"] for model in page["data"]]
        has_more = page["has_more"] and names[-1].startswith("page-")
        pages += 1
        assert pages < 10
    assert [name for name in names if name.startswith("page-")] == ["page-a", "page-c", "page-d"]
    (page_c,) = (await http.get("/v1/models?limit=1&after=page-a")).json()["data"]
    assert (page_c["versions"], page_c["aliases"]) == ([1], {"production": 1})


async def test_a_load_after_a_repair_and_an_unload_reach_every_process(
    service: ServiceProcess, trunk: TrunkManifest, tmp_path: Path
):
    elsewhere = Registry(ArtifactStore(str(tmp_path)))
    publish(elsewhere, add_text_trunk(elsewhere), "mended")
    sound = (tmp_path / MENDED / "versions/1/head.onnx").read_bytes()
    (tmp_path / MENDED / "versions/1/head.onnx").write_bytes(sound[:40])
    (tmp_path / MENDED).rename(service.folder / "store" / MENDED)
    async with service.one_client_per_process() as processes:
        first = next(iter(processes.values()))
        url = "/v2/repository/models/mended"
        assert (await first.post(f"{url}/load")).status_code == 400
        await until_each_says(processes, "refused", "head.onnx does not match its hash")
        (service.folder / "store" / MENDED / "versions/1/head.onnx").write_bytes(sound)
        assert (await first.post(f"{url}/load")).status_code == 200
        await until_each_says(processes, "refused", None)
        await until_all_answer(processes, "mended", "mended@1")
        await until_each_says(processes, "loaded", True)
        assert (await first.post(f"{url}/unload")).status_code == 200
        await until_each_says(processes, "loaded", False)


async def until_each_says(
    processes: dict[int, httpx.AsyncClient], field: str, expected: object
) -> None:
    """Wait until each process says so of `mended`."""
    async with asyncio.timeout(10):
        for client in processes.values():
            while (await client.get("/v1/models/mended")).json().get(field) != expected:
                await asyncio.sleep(0.01)


async def test_the_models_that_there_are(openai: AsyncOpenAI):
    models = {model.id: model async for model in openai.models.list()}
    assert {*BACKBONES, "pets", "shapes"} <= models.keys()
    pets = models["pets"]
    assert (pets.object, pets.owned_by) == ("model", "default")
    extra = pets.model_extra or {}
    assert extra["labels"] == ["cat", "dog", "cow"]
    assert (extra["versions"], extra["aliases"]) == ([1], {"production": 1})
    assert extra["served"] is True
    for reference in ("pets", "pets@1", "minilm"):
        assert (await openai.models.retrieve(reference)).id == reference
    assert (await openai.models.retrieve("pets:production")).id == "pets"
    for reference in ("cats", "pets@9", "pets:nothing"):
        with pytest.raises(sdk.NotFoundError):
            await openai.models.retrieve(reference)


async def test_deleting(service: ServiceProcess, openai: AsyncOpenAI, trunk: TrunkManifest):
    for seed in (1, 2):
        publish(service.registry, trunk, "doomed", seed=seed)
    async with light_load(service), service.one_client_per_process() as processes:
        await until_all_answer(processes, "doomed", "doomed@2")
        with pytest.raises(sdk.ConflictError):
            await openai.models.delete("doomed@2")
        assert (await openai.models.delete("doomed@1")).deleted
        assert max((await until_all_answer(processes, "doomed@1", None)).values()) < 1
        assert await answers(next(iter(processes.values())), "doomed") == "doomed@2"
        assert (await openai.models.delete("doomed")).deleted
        assert max((await until_all_answer(processes, "doomed", None)).values()) < 1
        with pytest.raises(sdk.NotFoundError):
            await openai.models.delete("doomed")
        await tell_again(service, trunk, processes)


async def tell_again(
    service: ServiceProcess, trunk: TrunkManifest, processes: dict[int, httpx.AsyncClient]
) -> None:
    """A name that was deleted may come back, with the next number."""
    publish(service.registry, trunk, "doomed")
    await until_all_answer(processes, "doomed", "doomed@3")


@pytest.mark.parametrize("reference", ["minilm", "efficientnet-lite0", "hf:a/b", "pets:production"])
async def test_what_cannot_be_deleted(openai: AsyncOpenAI, reference: str):
    with pytest.raises(sdk.BadRequestError):
        await openai.models.delete(reference)
