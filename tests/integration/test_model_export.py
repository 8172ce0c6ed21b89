"""Taking a model out: its files over HTTP, and one stand-alone graph made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import onnxruntime
import pytest

from cli.client import Client
from cli.export import export_model
from cli.failures import CommandError
from core.adapters import feed, read_adapter
from core.files import sha256
from core.manifests import ModelManifest
from core.trunk import Trunk
from tests.builders import (
    SLOTS,
    add_text_trunk,
    publish,
    publish_full,
    publish_low_rank,
    random_adapter,
)
from tests.integration.service_process import eventually

if TYPE_CHECKING:
    from tests.integration.service_process import ServiceProcess

pytest_plugins = ["tests.integration.service_fixtures"]

TEXTS = ["good cat", "bad dog red blue", "cat"]


@pytest.fixture(scope="module")
def models(service: ServiceProcess) -> dict[str, ModelManifest]:
    trunk = add_text_trunk(service.registry, adaptable=True)
    return {
        "linear": publish(service.registry, trunk, "out-linear"),
        "low_rank": publish_low_rank(service.registry, trunk, "out-deltas", seed=3),
        "full": publish_full(service.registry, "out-full", seed=5),
    }


@pytest.fixture
def client(service: ServiceProcess) -> Any:
    with Client(service.url) as found:
        yield found


def answers(service: ServiceProcess, model: ModelManifest) -> np.ndarray:
    def asked() -> httpx.Response:
        body = {"model": model.reference, "inputs": TEXTS, "top_k": len(model.labels)}
        return httpx.post(f"{service.url}/v1/predict", json=body, timeout=20)

    eventually(lambda: asked().status_code == 200, 20, f"{model.reference} answers")
    rows = [
        {score["label"]: score["score"] for score in row["scores"]}
        for row in asked().json()["predictions"]
    ]
    return np.array([[row[label] for label in model.labels] for row in rows], np.float32)


@pytest.mark.parametrize("kind", ["linear", "low_rank", "full"])
def test_the_stand_alone_graph_answers_as_the_service_does(
    service: ServiceProcess, client: Client, models: dict[str, ModelManifest], kind: str,
    tmp_path: Path,
):  # fmt: skip
    model, folder = models[kind], tmp_path / "out"
    export_model(client, model.reference, folder)
    described = json.loads((folder / "model.json").read_bytes())
    assert (described["model"], described["labels"]) == (model.reference, model.labels)
    trunk = Trunk.load_for(service.registry, model, threads=1, max_pixels=1)
    rows = [trunk.preprocessor.prepare(text) for text in TEXTS]  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    # Whatever changes a model is in it: what is left to feed are the inputs.
    assert {each.name for each in session.get_inputs()} == {"input_ids", "attention_mask"}
    (probabilities,) = session.run(["probabilities"], trunk.feed(rows))
    np.testing.assert_allclose(probabilities, answers(service, model), atol=1e-5)
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.json", "preprocess.json"}
    if kind == "low_rank":
        names = ("adapter_config.json", "adapter_model.safetensors")
        config, weights = ((folder / name).read_bytes() for name in names)
        found, expected = read_adapter(config, weights, SLOTS), random_adapter(3)
        for name, value in feed(expected, SLOTS).items():
            np.testing.assert_array_equal(feed(found, SLOTS)[name], value)


def test_every_file_of_a_model_can_be_had(
    service: ServiceProcess, models: dict[str, ModelManifest]
):
    with httpx.Client(base_url=f"{service.url}/v1/models/", timeout=20) as http:
        answers(service, models["low_rank"])
        listed = http.get(f"{models['low_rank'].reference}/files").json()
        names = {each["id"]: each for each in listed["data"]}
        assert names.keys() >= {"head.onnx", "adapter_model.safetensors", "trunk/trunk.onnx"}
        for name, each in names.items():
            answer = http.get(f"{models['low_rank'].reference}/files/{name}")
            assert answer.status_code == 200
            assert (len(answer.content), sha256(answer.content)) == (each["bytes"], each["sha256"])
        for path in (
            "out-linear@1/files/adapter_model.safetensors", "out-linear@1/files/manifest.json",
            "out-linear@1/files/..%2f1%2fhead.onnx", "out-linear@9/files", "minilm/files",
            "nobody/files/head.onnx",
        ):  # fmt: skip
            answer = http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path


def test_an_export_overwrites_nothing(
    client: Client, models: dict[str, ModelManifest], tmp_path: Path
):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CommandError, match="not empty"):
        export_model(client, models["linear"].reference, tmp_path)
    with pytest.raises(httpx.HTTPStatusError):
        export_model(client, "nobody", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
