"""`/v2/repository`: what this process serves, and why it does not serve the rest.

The index is read from the serving set, so it says what is true of the process that answers. A load
is a look into the registry now rather than at the next change; nothing can be uploaded with it.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from core.errors import InvalidRequest, NotFound, Unavailable
from core.identifiers import ModelReference
from service.api.inference.endpoints import reference
from service.api.inference.messages import RepositoryIndexRequest, RepositoryRequest
from service.api.responses import invalid_body, json_response, read_json
from service.runtime import Runtime, runtime, tenant


async def index(request: Request) -> Response:
    """POST /v2/repository/index"""
    run, owner = runtime(request), tenant(request)
    try:
        asked = RepositoryIndexRequest.model_validate(await _body(request))
    except ValidationError as error:
        raise invalid_body(error) from None
    return json_response(
        [entry for entry in _entries(run, owner) if entry["state"] == "READY" or not asked.ready]
    )


async def load(request: Request) -> Response:
    """POST /v2/repository/models/{model}/load"""
    run, owner = runtime(request), tenant(request)
    named = await _named(request)
    await run.loader.reconcile_model(owner, named.name)
    try:
        run.predictor.resolve(owner, named)
    except Unavailable as error:
        raise InvalidRequest(error.message, param="model", code=error.error_code) from None
    return json_response({})


async def unload(request: Request) -> Response:
    """POST /v2/repository/models/{model}/unload"""
    run, owner = runtime(request), tenant(request)
    named = await _named(request)
    if (owner, named.name) not in run.loader.current.models:
        raise NotFound(f"no model {named}", param="model")
    await run.loader.unload(owner, named.name)
    return json_response({})


async def _named(request: Request) -> ModelReference:
    """Return the model that the path names; raise `InvalidRequest` for parameters."""
    try:
        asked = RepositoryRequest.model_validate(await _body(request))
    except ValidationError as error:
        raise invalid_body(error) from None
    refused = [name for name in asked.parameters if name == "config" or name.startswith("file:")]
    if refused:
        raise InvalidRequest("a model cannot be uploaded here; create a job", param="parameters")
    return reference(request)


async def _body(request: Request) -> Any:
    """Return the body's JSON; clients may send none."""
    return await read_json(request) if await request.body() else {}


def _entries(run: Runtime, owner: str) -> list[dict[str, str]]:
    entries = []
    for (of, name), state in sorted(run.loader.current.models.items()):
        if of != owner:
            continue
        reasons = {**dict.fromkeys(state.versions, ""), **state.refused}
        for number, reason in sorted(reasons.items()):
            entries.append(
                {
                    "name": name,
                    "version": str(number),
                    "state": "UNAVAILABLE" if reason else "READY",
                    "reason": reason,
                }
            )
    return entries
