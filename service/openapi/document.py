"""Routes and operations as one OpenAPI 3.1 document.

Every route is in it: one without an operation has its handler's docstring for a summary, and a test
fails until it has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.routing import Route

from core import __version__
from service.api.inference.messages import InferenceError
from service.openapi.operations import FORM, JSON, OPERATIONS, Operation
from service.openapi.schemas import Error

_REF = "#/components/schemas/{model}"
_CATCH_ALL = "{path:path}"
_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_FORM_SCHEMA = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "purpose": {"const": "fine-tune"},
    },
}


def described_routes(routes: Iterable[object]) -> Iterator[tuple[str, str, Route]]:
    """Yield the method and the path, as OpenAPI writes it, of every route that is an endpoint."""
    for route in routes:
        if isinstance(route, Route) and _CATCH_ALL not in route.path:
            for method in sorted((route.methods or set()) - {"HEAD"}):
                yield method, _PARAMETER.sub(r"{\1}", route.path), route


def build_document(routes: Iterable[object]) -> dict[str, Any]:
    """Return the document of these routes."""
    paths: dict[str, dict[str, Any]] = {}
    used: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (Error, "serialization"), (InferenceError, "serialization"),
    ]  # fmt: skip
    for method, path, route in described_routes(routes):
        summary = (route.endpoint.__doc__ or path).strip().splitlines()[0]
        operation = OPERATIONS.get((method, path), Operation(summary))
        described = _describe(operation, path)
        described["operationId"] = route.endpoint.__name__ + (
            "_of_version" if "{version}" in path else ""
        )
        paths.setdefault(path, {})[method.lower()] = described
        used += _models(operation)
    _, definitions = models_json_schema(list(dict.fromkeys(used)), ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Graft",
            "version": __version__,
            "description": "Fine-tunes pretrained models and serves them.",
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _models(operation: Operation) -> list[tuple[type[BaseModel], JsonSchemaMode]]:
    found: list[tuple[type[BaseModel], JsonSchemaMode]] = []
    if operation.body is not None:
        found.append((operation.body, "validation"))
    answers = operation.answer if isinstance(operation.answer, list) else [operation.answer]
    # By the rules of validation too, so that a field with a default may be absent.
    return found + [(answer, "validation") for answer in answers if answer is not None]


def _describe(operation: Operation, path: str) -> dict[str, Any]:
    error = InferenceError if path.startswith("/v2") else Error
    failure = {
        "description": "What went wrong",
        "content": {JSON: {"schema": _reference(error)}},
    }
    described: dict[str, Any] = {
        "summary": operation.summary,
        "tags": [_tag(path)],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in _PARAMETER.findall(path)
        ]
        + [
            {"name": name, "in": "query", "description": what, "schema": {"type": "string"}}
            for name, what in operation.query.items()
        ],
        "responses": {
            "200": {
                "description": operation.summary,
                "content": {operation.media: _answer_schema(operation)}
                | {media: {} for media in operation.other_media},
            },
            "4XX": failure,
            "5XX": failure,
        },
    }
    content: dict[str, Any] = {}
    if operation.body is not None:
        content[JSON] = {"schema": _reference(operation.body)}
    content |= {
        media: {"schema": _FORM_SCHEMA} if media == FORM else {} for media in operation.also
    }
    if content:
        described["requestBody"] = {"content": content}
    if operation.is_open:
        described["security"] = []
    return described


def _answer_schema(operation: Operation) -> dict[str, Any]:
    if operation.answer is None:
        return {}
    if isinstance(operation.answer, list):
        return {"schema": {"type": "array", "items": _reference(operation.answer[0])}}
    return {"schema": _reference(operation.answer)}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _tag(path: str) -> str:
    parts = path.strip("/").split("/")
    if parts[0] == "v2":
        return "Open Inference Protocol"
    return parts[1] if parts[0] == "v1" else "operations"
