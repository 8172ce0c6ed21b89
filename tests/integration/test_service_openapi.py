"""Live answers against `/openapi.json`: each fits its schema, and has no field beyond it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.builders import add_text_trunk, publish
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.integration.service_process import FakeWorker, ServiceProcess

pytestmark = pytest.mark.anyio
pytest_plugins = ["tests.integration.service_fixtures"]


def closed(schema: Any) -> Any:
    """The schema with every object closed, so that a field it does not know is an error."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(each) for name, each in schema.items()}
    if "properties" in schema and "additionalProperties" not in schema:
        inner["additionalProperties"] = False
    return inner


class Checked:
    """A client that holds every answer against the document."""

    def __init__(self, http: httpx.AsyncClient, document: dict[str, Any]) -> None:
        self.http = http
        self.document = closed(document)
        self.seen: set[tuple[str, str]] = set()

    async def __call__(self, method: str, template: str, status: int = 200, **options: Any) -> Any:
        known = ("file_id", "job_id", "ref", "name", "model", "version", "file")
        names = {name: options.pop(name) for name in known if name in options}
        response = await self.http.request(method, template.format(**names), **options)
        assert response.status_code == status, response.text
        operation = self.document["paths"][template][method.lower()]
        key = "200" if status == 200 else f"{status // 100}XX"
        content = operation["responses"][key]["content"]
        media = response.headers["content-type"].split(";")[0]
        assert media in content, f"{media} of {method} {template}"
        self.seen.add((method, template))
        if media != "application/json":
            return response.text
        schema = {**content[media].get("schema", {}), "components": self.document["components"]}
        Draft202012Validator(schema).validate(response.json())
        return response.json()


async def test_answers_are_what_the_document_says(
    service: ServiceProcess, http: httpx.AsyncClient, worker: FakeWorker
):
    call = Checked(http, (await http.get("/openapi.json")).json())
    name = f"doc-{secrets.token_hex(4)}"
    published = publish(service.registry, add_text_trunk(service.registry), name)
    await call("GET", "/openapi.json")
    await call("GET", "/docs")
    await call("GET", "/livez")
    await call("GET", "/readyz")
    await call("GET", "/metrics")

    file = await call("POST", "/v1/files", files={"file": ("a.csv", b"text,label\na,b\n")})
    await call("GET", "/v1/files")
    await call("GET", "/v1/files/{file_id}", file_id=file["id"])
    await call("GET", "/v1/files/{file_id}/content", file_id=file["id"])
    await call("GET", "/v1/files/{file_id}", 404, file_id="file-none")
    body = {"model": "minilm", "training_file": file["id"], "suffix": name}
    job = await call("POST", "/v1/fine_tuning/jobs", json=body)
    path = "/v1/fine_tuning/jobs/{job_id}"
    await call("GET", "/v1/fine_tuning/jobs")
    await call("GET", path, job_id=job["id"])
    await call("GET", path + "/events", job_id=job["id"])
    await call("POST", path + "/resume", 409, job_id=job["id"])
    await call("POST", path + "/pause", job_id=job["id"])
    await call("POST", path + "/resume", job_id=job["id"])
    await call("GET", path + "/checkpoints", job_id=job["id"])
    await call("POST", path + "/cancel", job_id=job["id"], json={"keep_best": True})
    await call("POST", path + "/cancel", 409, job_id=job["id"])
    await call("POST", "/v1/fine_tuning/jobs", 400, json={})
    await call("DELETE", "/v1/files/{file_id}", file_id=file["id"])

    def is_served() -> bool:
        return httpx.get(f"{service.url}/v2/models/{name}/ready").status_code == 200

    eventually(is_served)
    await call("GET", "/v1/models")
    await call("GET", "/v1/models/{ref}", ref="minilm")
    await call("GET", "/v1/models/{ref}", ref=name)
    await call("GET", "/v1/models/{ref}/files", ref=name)
    await call("GET", "/v1/models/{ref}/files/{file}", ref=name, file="head.onnx")
    releases = "/v1/models/{name}/releases"
    aliases = {"aliases": {"staging": published.version}}
    await call("POST", releases, name=name, json=aliases)
    await call("GET", releases, name=name)

    texts = {"model": "pets", "inputs": ["good cat", ""]}
    for explain in (False, True):
        await call("POST", "/v1/predict", json=texts | {"explain": explain})
    await call("POST", "/v1/predict", 404, json=texts | {"model": "nothing"})
    for encoding in ("float", "base64"):
        asked = {"model": "pets", "input": "cat", "encoding_format": encoding}
        await call("POST", "/v1/embeddings", json=asked)

    for path in ("/v2", "/v2/health/live", "/v2/health/ready"):
        await call("GET", path)
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["cat"]}
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        await call("GET", path, model="pets", version="1")
        await call("GET", path + "/ready", model="pets", version="1")
        await call("POST", path + "/infer", model="pets", version="1", json={"inputs": [tensor]})
        await call("POST", path + "/infer", 400, model="pets", version="1", json={})
    await call("POST", "/v2/repository/index", json={})
    for action in ("load", "unload"):
        await call("POST", "/v2/repository/models/{model}/" + action, model=name)
    await call("DELETE", "/v1/models/{ref}", ref=name)

    every = {
        (method.upper(), path)
        for path, methods in call.document["paths"].items()
        for method in methods
    }
    assert every == call.seen
