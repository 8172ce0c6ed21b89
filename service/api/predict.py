"""`POST /v1/predict`: texts or images in, labels and probabilities out, or values.

A JSON body with `inputs`, or one encoded image as the raw body with `?model=`.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from core.errors import GraftError, InvalidRequest, PayloadTooLarge
from core.identifiers import ModelReference
from service.answers import Prediction, Predictions
from service.api.errors import error_body
from service.api.responses import (
    json_response,
    media_type,
    query_bool,
    query_int,
    read_body,
    while_connected,
)
from service.explanation import Weight
from service.inputs import ImageInput, Input
from service.runtime import Runtime, runtime, tenant

MAX_TOP_K = 1_000
MAX_EXPLAINED = 8
"""Inputs of one request that are explained: each costs as much as some thirty others."""
TIMEOUT_HEADER = "x-request-timeout-ms"
IMAGE_TYPES = frozenset({"image/jpeg", "image/png", "image/webp"})


class PredictRequest(BaseModel):
    """The body of `POST /v1/predict`. `top_k` limits the scores listed per input."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    inputs: Annotated[list[Any], Field(min_length=1)]
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] = 3
    explain: StrictBool = False


async def create_prediction(request: Request) -> Response:
    """POST /v1/predict"""
    run = runtime(request)
    inputs: list[Input | GraftError]
    if media_type(request.headers) in IMAGE_TYPES:
        model = request.query_params.get("model", "")
        top_k = query_int(request, "top_k", 3, low=1, high=MAX_TOP_K)
        explain = query_bool(request, "explain")
        inputs = [ImageInput(await request.body())]
    else:
        body = await read_body(request, PredictRequest)
        model, top_k, explain = body.model, body.top_k, body.explain
        inputs = [parse_input(item) for item in body.inputs]
    timeout = timeout_seconds(request, run)
    async with while_connected(request):
        answer = await predict(run, tenant(request), model, inputs, top_k, timeout, explain)
    return json_response(answer)


async def predict(
    run: Runtime,
    owner: str,
    model: str,
    inputs: list[Input | GraftError],
    top_k: int,
    timeout: float,
    explain: bool = False,
) -> dict[str, Any]:
    """Return the answer's JSON; shared with the BentoML method."""
    if len(inputs) > run.settings.max_inputs:
        raise PayloadTooLarge(
            f"send at most {run.settings.max_inputs} inputs in a request", param="inputs"
        )
    if explain and len(inputs) > MAX_EXPLAINED:
        raise InvalidRequest(f"at most {MAX_EXPLAINED} inputs are explained", param="explain")
    began = time.monotonic()
    reference = ModelReference.parse(model)
    good: list[Input] = [item for item in inputs if not isinstance(item, GraftError)]
    found = await run.predictor.predict(
        owner, reference, good, top_k=top_k, timeout_seconds=timeout
    )
    described = _rows(found)
    if explain:
        left = timeout - (time.monotonic() - began)
        pinned = await run.predictor.resolve(
            owner, ModelReference.parse(found.model), timeout_seconds=left
        )
        for item, row, shown in zip(good, found.rows, described, strict=True):
            if not isinstance(row, GraftError):
                left = timeout - (time.monotonic() - began)
                label = row.scores[0][0] if row.scores else None
                weights = await run.predictor.explain(pinned, item, label, timeout_seconds=left)
                shown["explanation"] = [_weight_object(item, each) for each in weights]
    rows = iter(described)
    return {
        "model": found.model,
        "predictions": [
            {"error": error_body(item)} if isinstance(item, GraftError) else next(rows)
            for item in inputs
        ],
        "timing_ms": found.timing_ms,
    }


def parse_input(item: Any) -> Input | GraftError:
    """Return one input of a JSON body, or what is wrong with it."""
    if isinstance(item, str):
        return item
    if isinstance(item, dict) and item.keys() == {"image"} and isinstance(item["image"], str):
        return ImageInput(item["image"])
    return InvalidRequest('an input is a string or {"image": "<base64>"}', param="inputs")


def timeout_seconds(request: Request, run: Runtime) -> float:
    """The caller's deadline from `X-Request-Timeout-Ms`, capped by the setting."""
    limit = run.settings.predict_timeout_seconds
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return limit
    if not text.isascii() or not text.isdigit() or int(text[:9]) == 0:
        raise InvalidRequest(f"{TIMEOUT_HEADER} must be a positive integer", param=TIMEOUT_HEADER)
    return min(limit, int(text[:9]) / 1000)


def _weight_object(item: Input, found: Weight) -> dict[str, Any]:
    if found.part.span is None:
        return {"box": found.part.box, "weight": found.weight}
    start, end = found.part.span
    assert isinstance(item, str)
    return {"text": item[start:end], "start": start, "end": end, "weight": found.weight}


def _rows(found: Predictions) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in found.rows:
        if isinstance(row, GraftError):
            rows.append({"error": error_body(row)})
        else:
            described = _answer(row)
            if row.novelty is not None:
                described["novelty"] = row.novelty
            rows.append(described)
    return rows


def _answer(row: Prediction) -> dict[str, Any]:
    """Return what is said of an input: a class, some of several labels, or a value."""
    if row.value is not None:
        described: dict[str, Any] = {"value": row.value}
        if row.interval is not None:
            half, coverage = row.interval.half_width, row.interval.coverage
            described["interval"] = {
                "low": row.value - half, "high": row.value + half, "coverage": coverage,
            }  # fmt: skip
        return described
    scores = [{"label": label, "score": score} for label, score in row.scores]
    if row.labels is not None:
        return {"labels": row.labels, "scores": scores}
    return {**scores[0], "scores": scores}
