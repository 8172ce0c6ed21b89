"""The Open Inference Protocol through Triton's own clients, and by hand where they cannot lie.

The schemas are those of the protocol's specification
(open_inference_rest.yaml) and of Triton's extensions, written down as JSON schema.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from jsonschema import Draft202012Validator
from tritonclient.utils import InferenceServerException

from tests.builders import add_text_trunk, encoded_image, head_files, publish
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.integration.service_process import ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]

LABELS = {"cat", "dog", "cow"}


def an_object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
    }


STRING = {"type": "string"}
SHAPE = {"type": "array", "items": {"type": "integer"}}
PARAMETERS = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
TENSOR_METADATA = an_object({"name": STRING, "datatype": STRING, "shape": SHAPE})
SCHEMAS = {
    "server": an_object(
        {"name": STRING, "version": STRING, "extensions": {"type": "array", "items": STRING}}
    ),
    "live": an_object({"live": {"const": True}}),
    "ready": an_object({"ready": {"const": True}}),
    "model_ready": an_object({"name": STRING, "ready": {"const": True}}),
    "model": an_object(
        {
            "name": STRING,
            "platform": STRING,
            "inputs": {"type": "array", "items": TENSOR_METADATA},
            "outputs": {"type": "array", "items": TENSOR_METADATA},
        },
        versions={"type": "array", "items": STRING},
    ),
    "infer": an_object(
        {
            "model_name": STRING,
            "outputs": {
                "type": "array",
                "items": an_object(
                    {"name": STRING, "shape": SHAPE, "datatype": {"enum": ["FP32", "BYTES"]}},
                    parameters=PARAMETERS,
                    data={"type": "array", "items": {"type": ["number", "string"]}},
                ),
            },
        },
        model_version=STRING,
        id=STRING,
        parameters=PARAMETERS,
    ),
    "index": {
        "type": "array",
        "items": an_object(
            {
                "name": STRING,
                "state": {"enum": ["READY", "UNAVAILABLE"]},
                "reason": STRING,
            },
            version=STRING,
        ),
    },
    "error": an_object({"error": {"type": "string", "minLength": 1}}),
}


def checked(kind: str, document: Any) -> Any:
    Draft202012Validator(SCHEMAS[kind]).validate(document)
    return document


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{service.port}") as client:
        yield client


def text_input(*texts: str, binary: bool = True, column: bool = False) -> triton.InferInput:
    shape = [len(texts), 1] if column else [len(texts)]
    sent = triton.InferInput("text", shape, "BYTES")
    sent.set_data_from_numpy(np.array(texts, dtype=object).reshape(shape), binary_data=binary)
    return sent


def test_health_and_metadata(client: triton.InferenceServerClient):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("pets")
    assert client.is_model_ready("pets", "1")
    assert not client.is_model_ready("pets", "9")
    assert not client.is_model_ready("nothing")
    checked("server", client.get_server_metadata())
    for version in ("", "1"):
        model = checked("model", client.get_model_metadata("pets", version))
        assert model["name"] == "pets"
        assert "1" in model["versions"]
        assert model["inputs"] == [
            {"name": "text", "datatype": "BYTES", "shape": [-1]},
            {"name": "features", "datatype": "FP32", "shape": [-1, 4]},
        ]
        assert model["outputs"] == [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ]
    assert client.get_model_metadata("shapes")["inputs"][0]["name"] == "image"


@pytest.mark.parametrize("reference", ["pets", "pets:production", "pets@1"])
@pytest.mark.parametrize("binary", [True, False])
async def test_inference_is_what_predict_answers(
    client: triton.InferenceServerClient, http: httpx.AsyncClient, reference: str, binary: bool
):
    plain = await http.post(
        "/v1/predict", json={"model": "pets", "inputs": ["good cat", "bad dog"]}
    )
    expected = plain.json()["predictions"]
    for column in (False, True):
        sent = text_input("good cat", "bad dog", binary=binary, column=column)
        result = client.infer(reference, [sent], request_id="r-7", priority=1)
        answer = checked("infer", result.get_response())
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("r-7", "pets", "1")
        probabilities = result.as_numpy("probabilities")
        labels = [label.decode() for label in result.as_numpy("label")]
        assert probabilities.shape == (2, 3)
        assert probabilities.dtype == np.float32
        assert labels == [row["label"] for row in expected]
        assert probabilities.max(axis=1) == pytest.approx(
            [row["score"] for row in expected], abs=1e-5
        )


def test_only_what_is_asked_for_and_as_it_is_asked_for(client: triton.InferenceServerClient):
    wanted = [
        triton.InferRequestedOutput("label", binary_data=False),
        triton.InferRequestedOutput("probabilities", binary_data=True),
    ]
    mixed = client.infer("pets", [text_input("cat")], outputs=wanted)
    assert checked("infer", mixed.get_response())["outputs"][0].keys() == {
        "name", "shape", "datatype", "data",
    }  # fmt: skip
    assert mixed.as_numpy("label").tolist()[0] in LABELS
    assert mixed.as_numpy("probabilities").sum() == pytest.approx(1, abs=1e-5)
    for binary in (True, False):
        one = [triton.InferRequestedOutput("label", binary_data=binary)]
        only = client.infer("pets", [text_input("cat")], outputs=one)
        assert [each["name"] for each in only.get_response()["outputs"]] == ["label"]
        assert only.as_numpy("probabilities") is None
        top = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
        ranked = client.infer("pets", [text_input("cat", "dog")], outputs=top)
        classes = ranked.as_numpy("probabilities")
        assert classes.shape == (2, 2)
        first = classes[0, 0].decode() if binary else classes[0, 0]
        value, index, label = first.split(":")
        assert 1 / 3 < float(value) <= 1
        assert ["cat", "dog", "cow"][int(index)] == label


def test_images_as_files_and_as_base64(client: triton.InferenceServerClient):
    image = encoded_image()
    results = []
    for item, binary in ((image, True), (base64.b64encode(image), False)):
        sent = triton.InferInput("image", [1], "BYTES")
        sent.set_data_from_numpy(np.array([item], dtype=object), binary_data=binary)
        results.append(client.infer("shapes", [sent]).as_numpy("probabilities"))
    assert results[0] == pytest.approx(results[1])


@pytest.mark.parametrize("binary", [True, False])
def test_features_that_the_caller_kept(
    client: triton.InferenceServerClient, service: ServiceProcess, binary: bool
):
    kept = np.array(
        [row.embedding for row in _embed(service, "pets", ["good cat", "bad dog"])], np.float32
    )
    sent = triton.InferInput("features", list(kept.shape), "FP32")
    sent.set_data_from_numpy(kept, binary_data=binary)
    by_features = client.infer("pets", [sent]).as_numpy("probabilities")
    by_text = client.infer("pets", [text_input("good cat", "bad dog")]).as_numpy("probabilities")
    assert by_features == pytest.approx(by_text, abs=1e-5)


def _embed(service: ServiceProcess, model: str, texts: list[str]) -> Any:
    from openai import OpenAI

    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as openai:
        return openai.embeddings.create(model=model, input=texts).data


async def test_the_asynchronous_client(service: ServiceProcess):
    async with triton_aio.InferenceServerClient(f"127.0.0.1:{service.port}") as client:
        assert await client.is_server_ready()
        assert (await client.get_model_metadata("pets"))["name"] == "pets"
        for binary in (True, False):
            sent = triton_aio.InferInput("text", [1], "BYTES")
            sent.set_data_from_numpy(np.array(["cat"], dtype=object), binary_data=binary)
            wanted = [triton_aio.InferRequestedOutput("label", binary_data=binary)]
            result = await client.infer("pets", [sent], "1", wanted)
            (label,) = result.as_numpy("label")
            assert (label.decode() if binary else label) in LABELS
        with pytest.raises(InferenceServerException, match="no model nothing"):
            await client.infer("nothing", [sent])


def test_the_repository(client: triton.InferenceServerClient, service: ServiceProcess):
    name = f"m-{secrets.token_hex(4)}"
    trunk = add_text_trunk(service.registry)
    publish(service.registry, trunk, name)
    client.load_model(name)
    # A load is the affair of the process asked; the other one finds the model when it next looks.
    asyncio.run(_ready_everywhere(service, name))
    assert client.is_model_ready(name)
    bad = head_files(trunk.dim)
    publish(service.registry, trunk, name, files=bad | {"head.onnx": b"not a graph"})
    with pytest.raises(InferenceServerException):
        client.load_model(f"{name}@2")

    def entries() -> list[dict[str, str]] | None:
        index = checked("index", client.get_model_repository_index())
        mine = [entry for entry in index if entry["name"] == name]
        return mine if [entry["version"] for entry in mine] == ["1", "2"] else None

    def refused() -> list[dict[str, str]] | None:
        found = entries()
        return found if found and found[1]["reason"] else None

    one, two = eventually(refused)
    assert one["state"] in ("READY", "UNAVAILABLE")  # the process asked may not have loaded it
    assert two["state"] == "UNAVAILABLE"
    assert client.infer(name, [text_input("cat")]).get_response()["model_version"] == "1"
    client.unload_model(name)
    assert client.infer(name, [text_input("cat")]).get_response()["model_version"] == "1"
    for wrong in ("nothing", f"{name}@9", f"{name}:production", "../x"):
        with pytest.raises(InferenceServerException) as caught:
            client.load_model(wrong)
        assert caught.value.status() in ("400", "404")
        with pytest.raises(InferenceServerException):
            client.unload_model(wrong)
    with pytest.raises(InferenceServerException, match="cannot be uploaded"):
        client.load_model(name, config="{}")


async def _ready_everywhere(service: ServiceProcess, name: str) -> None:
    async with service.one_client_per_process() as processes, asyncio.timeout(15):
        for http in processes.values():
            while not (await http.get(f"/v2/models/{name}/ready")).is_success:
                await asyncio.sleep(0.02)


async def test_the_index_may_be_asked_for_what_answers(http: httpx.AsyncClient):
    index = (await http.post("/v2/repository/index", json={"ready": True})).json()
    assert {entry["state"] for entry in checked("index", index)} == {"READY"}


def body(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["cat"]}
    return {"inputs": [tensor | changes.pop("tensor", {})], **changes}


async def test_flat_and_nested_data(http: httpx.AsyncClient):
    for data in ([[1, 2, 3, 4], [5, 6, 7, 8]], [1, 2, 3, 4, 5, 6, 7, 8]):
        tensor = {"name": "features", "shape": [2, 4], "datatype": "FP32", "data": data}
        response = await http.post("/v2/models/pets/infer", json={"inputs": [tensor]})
        answer = checked("infer", response.json())
        assert answer["outputs"][0]["shape"] == [2, 3]
        assert len(answer["outputs"][0]["data"]) == 6
        assert "id" not in answer


BAD_BODIES: dict[str, Any] = {
    "another input": body(tensor={"name": "image"}),
    "an unknown input": body(tensor={"name": "x"}),
    "two inputs": {"inputs": body()["inputs"] * 2},
    "no inputs": {"inputs": []},
    "an unknown output": body(outputs=[{"name": "logits"}]),
    "an output twice": body(outputs=[{"name": "label"}] * 2),
    "classes of labels": body(outputs=[{"name": "label", "parameters": {"classification": 2}}]),
    "no classes": body(outputs=[{"name": "probabilities", "parameters": {"classification": 0}}]),
    "an id that is a number": body(id=7),
    "a negative shape": body(tensor={"shape": [-1]}),
    "a huge shape": body(tensor={"shape": [1 << 60]}),
    "a timeout in words": body(parameters={"timeout": "1s"}),
    "an empty text": body(tensor={"data": [" "]}),
    "features of another width": body(
        tensor={"name": "features", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    ),
    "features that are infinite": body(
        tensor={"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [1e300] * 4}
    ),
    "a list": [],
    "null": None,
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_request_is_a_400_that_is_a_string(http: httpx.AsyncClient, name: str):
    response = await http.post("/v2/models/pets/infer", json=BAD_BODIES[name])
    assert response.status_code == 400, response.text
    checked("error", response.json())


async def test_a_bad_row_is_named(http: httpx.AsyncClient):
    sent = body(tensor={"shape": [3], "data": ["cat", "", "dog"]})
    response = await http.post("/v2/models/pets/infer", json=sent)
    assert response.status_code == 400
    assert response.json()["error"].startswith("row 1: ")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/nothing", 404),
        ("GET", "/v2/models/pets/versions/9", 404),
        ("GET", "/v2/models/pets/versions/x", 400),
        ("GET", "/v2/models/pets@1/versions/1", 400),
        ("GET", "/v2/models/pets:production/versions/1", 400),
        ("GET", "/v2/models/..%2fpets", 404),
        ("GET", "/v2/models/pets%00", 400),
        ("GET", "/v2/nothing", 404),
        ("DELETE", "/v2/models/pets", 404),
        ("GET", "/v2/models/pets/infer", 404),
    ],
)
async def test_errors_are_strings(http: httpx.AsyncClient, method: str, path: str, status: int):
    response = await http.request(method, path)
    assert response.status_code == status
    checked("error", response.json())


@pytest.mark.parametrize("length", ["-1", "0", "x", "99999999", "²", "1" * 400, ""])
async def test_a_json_length_that_lies(http: httpx.AsyncClient, length: str):
    response = await http.post(
        "/v2/models/pets/infer",
        content=json.dumps(body()).encode(),
        headers={"Inference-Header-Content-Length": length.encode("latin-1")},
    )
    assert response.status_code == 400
    checked("error", response.json())


async def test_binary_lies_over_the_wire(http: httpx.AsyncClient):
    for size, payload in ((8, b"\xff" * 8), (1 << 39, b"x"), (4, struct.pack("<I", 1)), (0, b"")):
        tensor = {"name": "text", "shape": [1], "datatype": "BYTES",
                  "parameters": {"binary_data_size": size}}  # fmt: skip
        head = json.dumps({"inputs": [tensor]}).encode()
        response = await http.post(
            "/v2/models/pets/infer",
            content=head + payload,
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
        assert response.status_code == 400
        checked("error", response.json())


async def test_other_refusals(http: httpx.AsyncClient):
    url = "/v2/models/pets/infer"
    for headers in ({"Content-Type": "text/csv"}, {"Content-Encoding": "gzip"}):
        response = await http.post(url, content=b"{}", headers=headers)
        assert response.status_code == 415
        checked("error", response.json())
    many = body(tensor={"shape": [65], "data": ["cat"] * 65})
    assert (await http.post(url, json=many)).status_code == 413
    large = await http.post(url, content=b"x" * 2_100_000)
    assert large.status_code == 413
    checked("error", large.json())
    long = body(tensor={"shape": [64], "data": ["good cat " * 2000] * 64})
    late = await http.post(url, json=long | {"parameters": {"timeout": 1}})
    assert late.status_code == 504
    checked("error", late.json())
