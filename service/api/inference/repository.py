"""`/v2/repository`: what this process serves, and why it does not serve the rest.

The index says what is true of the process that answers. A load looks into the registry now rather
than at the next change, and tries again what was refused; nothing can be uploaded with it. An
unload frees memory and takes nothing out of service. The process that answers has done either
before it does; the others hear of it by the change feed.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from core.changes import Change
from core.errors import InvalidRequest, Unavailable
from core.identifiers import ModelReference
from service.api.inference.endpoints import reference
from service.api.inference.messages import RepositoryIndexRequest, RepositoryRequest
from service.api.predict import timeout_seconds
from service.api.responses import invalid_body, json_response, read_json
from service.live_models import loaded_within
from service.runtime import runtime, tenant
from service.serving_set import IndexEntry

UNLOADED = "not in memory; the first request loads it"


async def index(request: Request) -> Response:
    """POST /v2/repository/index"""
    owner = tenant(request)
    try:
        asked = RepositoryIndexRequest.model_validate(await _body(request))
    except ValidationError as error:
        raise invalid_body(error) from None
    return json_response(
        [
            _entry(entry)
            for entry in runtime(request).loader.index()
            if entry.tenant == owner and (entry.state == "READY" or not asked.ready)
        ]
    )


async def load(request: Request) -> Response:
    """POST /v2/repository/models/{model}/load"""
    run, owner = runtime(request), tenant(request)
    named = await _named(request)
    try:
        async with loaded_within(timeout_seconds(request, run)):
            await run.loader.load(owner, named.name, named.version)
    except Unavailable as error:
        raise InvalidRequest(error.message, param="model", code=error.error_code) from None
    await _tell_others(request, named, "reloaded")
    return json_response({})


async def unload(request: Request) -> Response:
    """POST /v2/repository/models/{model}/unload"""
    named = await _named(request)
    await runtime(request).loader.unload(tenant(request), named.name, named.version)
    await _tell_others(request, named, "unloaded")
    return json_response({})


async def _tell_others(
    request: Request, named: ModelReference, what: Literal["reloaded", "unloaded"]
) -> None:
    change = Change(tenant=tenant(request), model=named.name, type=what, version=named.version)
    with suppress(Unavailable):  # without Redis it holds for this process only
        await runtime(request).feed.publish(change)


async def _named(request: Request) -> ModelReference:
    """Return the model that the path names; raise `InvalidRequest` for parameters."""
    try:
        asked = RepositoryRequest.model_validate(await _body(request))
    except ValidationError as error:
        raise invalid_body(error) from None
    if ":" in request.path_params["model"]:
        raise InvalidRequest("name a model, or 'name@version', not an alias", param="model")
    refused = [name for name in asked.parameters if name == "config" or name.startswith("file:")]
    if refused:
        raise InvalidRequest("a model cannot be uploaded here; create a job", param="parameters")
    return reference(request)


async def _body(request: Request) -> Any:
    """Return the body's JSON; clients may send none."""
    return await read_json(request) if await request.body() else {}


def _entry(entry: IndexEntry) -> dict[str, str]:
    """Return an entry in the protocol's words, which has no third state."""
    is_ready = entry.state == "READY"
    return {
        "name": entry.name,
        "version": str(entry.version),
        "state": "READY" if is_ready else "UNAVAILABLE",
        "reason": entry.reason or ("" if is_ready else UNLOADED),
    }
