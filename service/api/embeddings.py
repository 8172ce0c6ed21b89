"""`/v1/embeddings`: features of texts or images, as OpenAI's clients ask for them.

`model` is a backbone, whose trunk is loaded when it is first asked for, or a fine-tuned model. An
image is a data URL. The protocol has no errors by row: one input that cannot be used refuses the
request, and is named.

OpenAI's client asks for base64 unless told otherwise, which is the float32 numbers, little-endian.
"""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from core.adapter_bank import BankedAdapter
from core.backbones import allowed
from core.errors import GraftError, InvalidRequest, PayloadTooLarge
from core.identifiers import ModelReference
from core.preprocessing import FloatArray
from service.api.errors import of_row
from service.api.predict import timeout_seconds
from service.api.responses import json_response, read_body, while_connected
from service.inputs import ImageInput, Input
from service.live_trunks import LiveTrunk
from service.predictor import Embedding
from service.runtime import Runtime, runtime, tenant

MAX_MODEL_CHARS = 256
DATA_URL = "data:image/"
_BASE64 = ";base64,"


class EmbeddingsRequest(BaseModel):
    """The body of `POST /v1/embeddings`. `user` is accepted and not used."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, StringConstraints(min_length=1, max_length=MAX_MODEL_CHARS)]
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class EmbeddingObject(BaseModel):
    """The features of one input: numbers, or base64 of float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


@dataclass(frozen=True)
class _Embedder:
    """A backbone, or a version of a fine-tuned model with its adapter if it has one."""

    reference: str
    name: str
    trunk: LiveTrunk
    adapter: BankedAdapter | None = None


class Usage(BaseModel):
    """Tokens that the trunk read, its own markers included; an image has none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The answer of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: Usage


async def create_embeddings(request: Request) -> Response:
    """POST /v1/embeddings"""
    run = runtime(request)
    asked = await read_body(request, EmbeddingsRequest)
    async with while_connected(request):
        answer = await embed(run, tenant(request), asked, timeout_seconds(request, run))
    return json_response(answer)


async def embed(
    run: Runtime, owner: str, asked: EmbeddingsRequest, timeout: float
) -> dict[str, Any]:
    """Return the answer's JSON; shared with the BentoML method."""
    began = time.monotonic()
    inputs = [parse_input(index, item) for index, item in enumerate(_listed(run, asked.input))]
    found = await _find(run, owner, asked.model, timeout)
    reference, dim = found.reference, found.trunk.trunk.dim
    if asked.dimensions not in (None, dim):
        raise InvalidRequest(
            f"features of {reference} have {dim} dimensions and lose their meaning when cut",
            param="dimensions",
        )
    left = timeout - (time.monotonic() - began)
    embedded = await run.predictor.embed(
        reference, found.name, found.trunk, inputs, adapter=found.adapter, timeout_seconds=left
    )
    for index, row in enumerate(embedded.rows):
        if isinstance(row, GraftError):
            raise of_row(row, f"input {index}", param="input")
    rows = cast("list[Embedding]", embedded.rows)
    tokens = sum(row.tokens for row in rows)
    encode = _as_base64 if asked.encoding_format == "base64" else _as_numbers
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(row.features)}
            for index, row in enumerate(rows)
        ],
        "model": reference,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def parse_input(index: int, item: Any) -> Input:
    """Return one input as the data plane reads it; raise `InvalidRequest` naming it."""
    if not isinstance(item, str):
        raise InvalidRequest(
            f"input {index}: send text, or an image as a data URL; not tokens", param="input"
        )
    if not item.startswith(DATA_URL):
        return item
    _, separator, data = item.partition(_BASE64)
    if not separator:
        raise InvalidRequest(f"input {index}: the data URL is not base64", param="input")
    return ImageInput(data)


def _listed(run: Runtime, given: str | list[Any]) -> list[Any]:
    listed = [given] if isinstance(given, str) else given
    if not listed:
        raise InvalidRequest("send at least one input", param="input")
    if len(listed) > run.settings.max_inputs:
        raise PayloadTooLarge(
            f"send at most {run.settings.max_inputs} inputs in a request", param="input"
        )
    return listed


async def _find(run: Runtime, owner: str, model: str, timeout: float) -> _Embedder:
    if model in allowed(run.settings.hf_models):
        return _Embedder(model, model, await run.backbones.get(model, timeout_seconds=timeout))
    asked = ModelReference.parse(model)
    found = await run.predictor.resolve(owner, asked, timeout_seconds=timeout)
    return _Embedder(found.manifest.reference, found.manifest.name, found.trunk, found.head.adapter)


def _as_numbers(features: FloatArray) -> list[float]:
    numbers: list[float] = features.tolist()
    return numbers


def _as_base64(features: FloatArray) -> str:
    return base64.b64encode(features.astype("<f4", copy=False).tobytes()).decode()
