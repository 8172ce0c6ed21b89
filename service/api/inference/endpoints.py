"""`/v2`: health, metadata and inference, translated to the data plane and back.

A model is named in the path by a reference (`name`, `name:alias`), and pinned by a version in the
path. It reads `text` or `image` (BYTES), or `features` (FP32) that the caller has kept, and gives
`probabilities` (FP32) and, where a row is of one class, `label` (BYTES); or `value` (FP32). The
protocol has no errors by row: one row that cannot
be used refuses the request, and is named.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import orjson
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from core import __version__
from core.datasets import Modality, Task
from core.errors import GraftError, InvalidRequest, UnsupportedMedia
from core.identifiers import ModelReference
from core.preprocessing import FloatArray
from service.api.errors import of_row
from service.api.inference import tensors
from service.api.inference.messages import InferRequest, RequestOutput
from service.api.inference.tensors import BytesTensor, FloatTensor, Tensor
from service.api.predict import timeout_seconds
from service.api.responses import invalid_body, json_response, media_type, while_connected
from service.caller import CALLER, Lane
from service.inputs import ImageInput, Input
from service.live_models import LiveModel
from service.predictor import Classification
from service.runtime import Runtime, runtime, tenant

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ["binary_tensor_data", "classification", "model_repository"]
PLATFORM = "onnxruntime_onnx"
PROBABILITIES, LABEL, VALUE, FEATURES = "probabilities", "label", "value", "features"
_OUTPUTS = {
    Task.SINGLE_LABEL: (PROBABILITIES, LABEL),
    Task.MULTI_LABEL: (PROBABILITIES,),
    Task.ORDINAL: (PROBABILITIES, LABEL),
    Task.REGRESSION: (VALUE,),
}
# The asynchronous client of Triton calls any body an octet-stream.
_MEDIA_TYPES = ("", "application/json", "application/octet-stream")


async def server_metadata(_: Request) -> Response:
    """GET /v2"""
    return json_response({"name": "graft", "version": __version__, "extensions": EXTENSIONS})


async def server_live(_: Request) -> Response:
    """GET /v2/health/live"""
    return json_response({"live": True})


async def server_ready(request: Request) -> Response:
    """GET /v2/health/ready"""
    is_ready = runtime(request).loader.current.is_complete
    return json_response({"ready": is_ready}, 200 if is_ready else 503)


async def model_metadata(request: Request) -> Response:
    """GET /v2/models/{model} and /v2/models/{model}/versions/{version}"""
    run, owner = runtime(request), tenant(request)
    model = await _resolve(request, timeout_seconds(request, run))
    manifest = model.manifest
    state = run.loader.current.models.get((owner, manifest.name))
    described = {
        PROBABILITIES: {"datatype": "FP32", "shape": [-1, len(manifest.labels)]},
        LABEL: {"datatype": "BYTES", "shape": [-1]},
        VALUE: {"datatype": "FP32", "shape": [-1, 1]},
    }
    return json_response(
        {
            "name": manifest.name,
            "versions": [str(number) for number in state.versions] if state else [],
            "platform": PLATFORM,
            "inputs": [
                {"name": _input_name(model), "datatype": "BYTES", "shape": [-1]},
                {"name": FEATURES, "datatype": "FP32", "shape": [-1, manifest.dim]},
            ],
            "outputs": [{"name": name, **described[name]} for name in _OUTPUTS[manifest.task]],
            "task": manifest.task,
            "labels": manifest.labels,
            "threshold": manifest.threshold,
        }
    )


async def model_ready(request: Request) -> Response:
    """GET /v2/models/{model}/ready and /v2/models/{model}/versions/{version}/ready"""
    model = await _resolve(request, timeout_seconds(request, runtime(request)))
    return json_response({"name": model.manifest.name, "ready": True})


async def infer(request: Request) -> Response:
    """POST /v2/models/{model}/infer and /v2/models/{model}/versions/{version}/infer"""
    run = runtime(request)
    began = time.monotonic()
    message, binary = await _read(request)
    sent = tensors.read_tensors(message, binary, max_rows=run.settings.max_inputs)
    timeout = timeout_seconds(request, run)
    if message.parameters.timeout is not None:
        timeout = min(timeout, message.parameters.timeout / 1e6)
    if message.parameters.priority:
        lane = Lane(min(message.parameters.priority - 1, max(Lane)))
        CALLER.set(replace(CALLER.get(), lane=lane))
    async with while_connected(request):
        model = await _resolve(request, timeout)
        names = _OUTPUTS[model.manifest.task]
        wanted = message.outputs or [RequestOutput(name=name) for name in names]
        _check_outputs(wanted, names)
        left = timeout - (time.monotonic() - began)
        found = await _classify(run, model, sent, left)
    return _answer(message, wanted, model, _outputs(found))


def reference(request: Request) -> ModelReference:
    """Return the model that the path names; raise `InvalidRequest` if it names two versions."""
    named: str = request.path_params["model"]
    found = ModelReference.parse(named)
    pinned: str | None = request.path_params.get("version")
    if pinned is None:
        return found
    if found.version is not None or ":" in named:
        raise InvalidRequest("name a version in the path or in the model, not in both")
    return ModelReference.parse(f"{named}@{pinned}")


async def _resolve(request: Request, timeout: float) -> LiveModel:
    run = runtime(request)
    return await run.predictor.resolve(tenant(request), reference(request), timeout_seconds=timeout)


def _input_name(model: LiveModel) -> str:
    return "text" if model.manifest.modality is Modality.TEXT else "image"


async def _read(request: Request) -> tuple[InferRequest, memoryview]:
    """Return the JSON of a request, and the bytes that follow it."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMedia("send the body without Content-Encoding")
    if media_type(request.headers) not in _MEDIA_TYPES:
        raise UnsupportedMedia("send application/json or application/octet-stream")
    body = memoryview(await request.body())
    end = _json_bytes(request.headers.get(HEADER_LENGTH), len(body))
    try:
        parsed = orjson.loads(body[:end])
        return InferRequest.model_validate(parsed), body[end:]
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValidationError as error:
        raise invalid_body(error) from None


def _json_bytes(header: str | None, total: int) -> int:
    """Return how many bytes of the body are JSON."""
    if header is None:
        return total
    if not (header.isascii() and header.isdigit()) or not 0 < int(header[:18]) <= total:
        raise InvalidRequest(
            f"{HEADER_LENGTH} must be the bytes of JSON at the start of the body",
            param=HEADER_LENGTH,
        )
    return int(header[:18])


async def _classify(
    run: Runtime, model: LiveModel, sent: Sequence[Tensor], timeout: float
) -> Classification:
    expected = _input_name(model)
    match sent:
        case [FloatTensor(name="features", values=values)]:
            return await run.predictor.classify_features(model, values)
        case [BytesTensor(name=name, items=items)] if name == expected:
            inputs = [_input(model, row, item) for row, item in enumerate(items)]
            return await run.predictor.classify(model, inputs, timeout_seconds=timeout)
    raise InvalidRequest(
        f"send one input: {expected!r} of BYTES, or {FEATURES!r} of FP32", param="inputs"
    )


def _input(model: LiveModel, row: int, item: str | bytes) -> Input:
    """Return one element as the data plane reads it; in JSON an image is base64."""
    if model.manifest.modality is Modality.IMAGE:
        return ImageInput(item)
    if isinstance(item, str):
        return item
    try:
        return item.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"row {row}: the text is not UTF-8", param="text") from None


def _outputs(found: Classification) -> FloatArray:
    """Return [n, width]; raise what is wrong with the first row that has none."""
    for row, result in enumerate(found.rows):
        if isinstance(result, GraftError):
            raise of_row(result, f"row {row}", param=result.param)
    return np.stack(cast("list[FloatArray]", found.rows))


def _check_outputs(wanted: Sequence[RequestOutput], known: Sequence[str]) -> None:
    names = [output.name for output in wanted]
    unknown = [name[:60] for name in names if name not in known]
    if unknown:
        given = " and ".join(repr(name) for name in known)
        there = f"there are {given}" if len(known) > 1 else f"there is {given}"
        raise InvalidRequest(f"no output {unknown[0]!r}; {there}", param="outputs")
    if len(set(names)) != len(names):
        raise InvalidRequest("an output is asked for twice", param="outputs")
    if any(o.name != PROBABILITIES and o.parameters.classification for o in wanted):
        raise InvalidRequest(f"classification is of {PROBABILITIES!r} only", param="outputs")


def _answer(
    message: InferRequest, wanted: Sequence[RequestOutput], model: LiveModel, rows: FloatArray
) -> Response:
    described: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for output in wanted:
        values: list[str] | FloatArray
        if output.name == LABEL:
            values = [model.manifest.labels[index] for index in rows.argmax(axis=1)]
            shape = [len(values)]
        elif output.parameters.classification is not None:
            values, shape = _classes(rows, model.manifest.labels, output.parameters.classification)
        else:
            values, shape = rows, list(rows.shape)
        is_text = isinstance(values, list)
        one: dict[str, Any] = {
            "name": output.name, "shape": shape, "datatype": "BYTES" if is_text else "FP32",
        }  # fmt: skip
        asked = output.parameters.binary_data
        if message.parameters.binary_data_output if asked is None else asked:
            data = (
                tensors.write_strings(values)
                if isinstance(values, list)
                else tensors.write_floats(values)
            )
            one["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        else:
            one["data"] = values if isinstance(values, list) else values.reshape(-1)
        described.append(one)
    head = {"model_name": model.manifest.name, "model_version": str(model.manifest.version)}
    if message.id is not None:
        head["id"] = message.id
    content = orjson.dumps({**head, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return Response(content, media_type="application/json")
    return Response(
        content + b"".join(binary),
        headers={HEADER_LENGTH: str(len(content))},
        media_type="application/octet-stream",
    )


def _classes(rows: FloatArray, labels: Sequence[str], count: int) -> tuple[list[str], list[int]]:
    """Return the likeliest classes of each row as `value:index:label`, flat, and their shape."""
    order = np.argsort(-rows, axis=1, kind="stable")[:, :count]
    found = [
        f"{row[index]:f}:{index}:{labels[index]}"
        for row, indices in zip(rows, order, strict=True)
        for index in indices
    ]
    return found, list(order.shape)
