"""Models with an adapter through every endpoint: their answers are those of the adapted trunk."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI

from core.adapters import feed
from core.changes import Change
from core.checkpoints import Checkpoints
from core.head import Head
from core.identifiers import ModelReference
from core.manifests import ModelManifest, TrunkManifest
from core.preprocessing import FloatArray
from core.trunk import Trunk
from tests.builders import (
    SLOTS,
    TENANT,
    add_text_trunk,
    low_rank,
    publish,
    publish_low_rank,
    random_adapter,
)

if TYPE_CHECKING:
    from tests.integration.service_process import FakeWorker, ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]

TEXTS = ["good cat", "bad dog red blue", "cat"]


class Oracle:
    """What models on the trunk answer, computed one row at a time and without a bank."""

    def __init__(self, service: ServiceProcess, manifest: TrunkManifest) -> None:
        self.manifest = manifest
        self.trunk = Trunk.load(service.registry, manifest.digest, threads=1, max_pixels=1)
        self._registry = service.registry

    def features(self, text: str, seed: int | None) -> FloatArray:
        """The features of the adapter of a seed; of the plain trunk for None."""
        row = self.trunk.preprocessor.prepare(text)  # type: ignore[arg-type]
        adapter = None if seed is None else random_adapter(seed)
        return self.trunk.encode([row], feed(adapter, SLOTS))[0]

    def scores(self, model: ModelManifest, text: str, seed: int | None) -> dict[str, float]:
        head = Head.load(self._registry, model, self.trunk)
        (row,) = head.predict(self.features(text, seed)[None])
        return dict(zip(model.labels, row.tolist(), strict=True))


@pytest.fixture(scope="module")
def oracle(service: ServiceProcess) -> Oracle:
    return Oracle(service, add_text_trunk(service.registry, adaptable=True))


@pytest.fixture(scope="module")
def models(service: ServiceProcess, oracle: Oracle) -> list[ModelManifest]:
    """Three models with an adapter of their number each, which nobody has asked for yet."""
    return [
        publish_low_rank(service.registry, oracle.manifest, f"deltas-{seed}", seed=seed)
        for seed in range(3)
    ]


async def ask(http: httpx.AsyncClient, model: str, **more: Any) -> dict[str, Any]:
    """Ask for every text; wait for the model if no process has heard of it yet."""
    async with asyncio.timeout(20):
        while True:
            body = {"model": model, "inputs": TEXTS, "top_k": 2, **more}
            response = await http.post("/v1/predict", json=body)
            if response.status_code != 404:
                break
            await asyncio.sleep(0.05)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def scores(answer: dict[str, Any]) -> list[dict[str, float]]:
    return [
        {each["label"]: each["score"] for each in row["scores"]} for row in answer["predictions"]
    ]


async def test_predictions_of_several_at_once_are_each_their_own(
    http: httpx.AsyncClient, oracle: Oracle, models: list[ModelManifest]
):
    answers = await asyncio.gather(*(ask(http, model.name) for model in models * 4))
    for number, answer in enumerate(answers):
        seed = number % len(models)
        for text, found in zip(TEXTS, scores(answer), strict=True):
            assert found == pytest.approx(oracle.scores(models[seed], text, seed), abs=1e-5)
    for model, answer in zip(models, answers, strict=False):
        plain = oracle.scores(model, TEXTS[1], None)
        assert scores(answer)[1] != pytest.approx(plain, abs=1e-3)


async def test_embeddings_are_those_of_the_adapter(
    http: httpx.AsyncClient, openai: AsyncOpenAI, oracle: Oracle, models: list[ModelManifest]
):
    await ask(http, models[2].name)
    for model, seed in ((models[2].reference, 2), ("minilm", None)):
        answer = await openai.embeddings.create(model=model, input=TEXTS)
        for text, row in zip(TEXTS, answer.data, strict=True):
            assert row.embedding == pytest.approx(oracle.features(text, seed).tolist(), abs=1e-5)


async def test_features_that_were_kept_and_texts_are_inferred_alike(
    http: httpx.AsyncClient, oracle: Oracle, models: list[ModelManifest]
):
    await ask(http, models[1].name)
    features = np.stack([oracle.features(text, 1) for text in TEXTS])
    for tensor in (
        {"name": "features", "shape": [*features.shape], "datatype": "FP32",
         "data": features.ravel().tolist()},
        {"name": "text", "shape": [len(TEXTS)], "datatype": "BYTES", "data": TEXTS},
    ):  # fmt: skip
        response = await http.post(f"/v2/models/{models[1].name}/infer", json={"inputs": [tensor]})
        outputs = {each["name"]: each for each in response.json()["outputs"]}
        expected = [oracle.scores(models[1], text, 1) for text in TEXTS]
        flat = [row[label] for row in expected for label in models[1].labels]
        assert outputs["probabilities"]["data"] == pytest.approx(flat, abs=1e-5)


async def test_explanations_ask_the_adapted_trunk(
    http: httpx.AsyncClient, oracle: Oracle, models: list[ModelManifest]
):
    answer = await ask(http, models[0].name, explain=True)
    row = answer["predictions"][0]  # "good cat"
    whole, *without = (
        oracle.scores(models[0], text, 0)[row["label"]] for text in ("good cat", "cat", "good")
    )
    weights = [part["weight"] for part in row["explanation"]]
    assert weights == pytest.approx([whole - each for each in without], abs=1e-5)


async def test_a_checkpoint_with_an_adapter_answers(
    service: ServiceProcess, http: httpx.AsyncClient, oracle: Oracle, models: list[ModelManifest]
):
    draft, files = low_rank(service.registry, oracle.manifest, models[0].name, seed=7)
    saved = Checkpoints(service.store, TENANT, draft.job).save(draft, 12, files)
    assert ModelReference.parse(saved.reference).name == models[0].name
    answer = await ask(http, saved.reference)
    assert answer["model"] == saved.reference
    assert scores(answer)[0] == pytest.approx(oracle.scores(saved, TEXTS[0], 7), abs=1e-5)


async def test_what_was_unloaded_comes_back_with_its_adapter(
    service: ServiceProcess, oracle: Oracle, models: list[ModelManifest]
):
    name = models[2].name
    async with service.one_client_per_process() as processes:
        for client in processes.values():
            before = scores(await ask(client, name))
            unloaded = await client.post(f"/v2/repository/models/{name}/unload", json={})
            assert unloaded.status_code == 200
            assert scores(await ask(client, name)) == before
            assert before[0] == pytest.approx(oracle.scores(models[2], TEXTS[0], 2), abs=1e-5)


async def test_a_linear_version_is_swapped_for_a_low_rank_one_under_load(
    service: ServiceProcess, http: httpx.AsyncClient, worker: FakeWorker, oracle: Oracle
):
    """Every answer is that of the version it names, and none fails."""
    name = f"swap-{secrets.token_hex(4)}"
    first = publish(service.registry, oracle.manifest, name)
    await ask(http, name)
    answers: list[dict[str, Any]] = []
    is_over = asyncio.Event()

    async def load() -> None:
        while not is_over.is_set():
            answers.append(await ask(http, name))

    callers = [asyncio.create_task(load()) for _ in range(8)]
    second = publish_low_rank(service.registry, oracle.manifest, name, seed=5)
    await worker.feed.publish(Change(tenant=TENANT, model=name, type="published"))
    async with asyncio.timeout(20):
        while {each["model"] for each in answers[-40:]} != {second.reference}:
            await asyncio.sleep(0.02)
    is_over.set()
    await asyncio.gather(*callers)
    expected = {
        manifest.reference: [oracle.scores(manifest, text, seed) for text in TEXTS]
        for manifest, seed in ((first, None), (second, 5))
    }
    assert {answer["model"] for answer in answers} == expected.keys()
    for answer in answers:
        for found, wanted in zip(scores(answer), expected[answer["model"]], strict=True):
            assert found == pytest.approx(wanted, abs=1e-5)
