"""`/v1/models/{name}/releases`: which version answers for a model's name, and the history of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from core.changes import Change
from core.errors import InvalidRequest, NotFound, Unavailable
from core.identifiers import PRODUCTION, Identifier, require_identifier
from core.manifests import Guard, Release, ReleaseContent, Share
from service.api.responses import json_response, query_int, read_body
from service.runtime import runtime, tenant

CHECKPOINT_PREFIX = "ckpt-"
MAX_ALIASES = 64
MAX_SHARES = 16
VersionNumber = Annotated[int, Field(ge=1, le=999_999_999)]


class ReleaseRequest(BaseModel):
    """The body of `POST /v1/models/{name}/releases`.

    Aliases that are not named stay, null removes one; `traffic`, `shadow` and `guard` are as given,
    so that leaving them out ends them. `rollback_to` takes all of an earlier release instead.
    `behind` is the release that the caller has looked at: if there is another by now, 409.
    """

    model_config = ConfigDict(extra="forbid")

    aliases: dict[Identifier, VersionNumber | None] = Field(default_factory=dict)
    traffic: Annotated[tuple[Share, ...], Field(max_length=MAX_SHARES)] = ()
    shadow: VersionNumber | None = None
    guard: Guard | None = None
    rollback_to: VersionNumber | None = None
    behind: Annotated[int, Field(ge=0)] | None = None
    reason: Annotated[str, StringConstraints(max_length=500)] = ""
    created_by: Annotated[str, StringConstraints(min_length=1, max_length=100)] = "api"


async def create_release(request: Request) -> Response:
    """POST /v1/models/{name}/releases"""
    run, owner = runtime(request), tenant(request)
    name = require_identifier(request.path_params["name"], param="model")
    body = await read_body(request, ReleaseRequest)
    _require_sense(body)
    releases = run.registry.releases

    def change(current: ReleaseContent | None) -> ReleaseContent:
        if body.rollback_to is not None:
            return releases.read(owner, name, body.rollback_to)
        return _content(body, current)

    if not await asyncio.to_thread(run.registry.versions, owner, name):
        raise NotFound(f"no model {name}", param="model")
    release = await asyncio.to_thread(
        releases.append, owner, name, change,
        created_by=body.created_by, reason=body.reason, behind=body.behind,
    )  # fmt: skip
    # It is released; that others hear of it at once is a courtesy, for they look by themselves.
    with suppress(Unavailable):
        await run.feed.publish(Change(tenant=owner, model=name, type="released"))
        await run.loader.reconcile_model(owner, name)
    return json_response(release_object(name, release))


async def list_releases(request: Request) -> Response:
    """GET /v1/models/{name}/releases: newest first; the first one holds"""
    run, owner = runtime(request), tenant(request)
    name = require_identifier(request.path_params["name"], param="model")
    limit = query_int(request, "limit", 20, low=1, high=100)
    after = query_int(request, "after", 999_999_999, low=1, high=999_999_999)
    releases = run.registry.releases

    def read() -> tuple[list[Release], bool]:
        numbers = [n for n in reversed(releases.numbers(owner, name)) if n < after]
        return [releases.read(owner, name, n) for n in numbers[:limit]], len(numbers) > limit

    found, has_more = await asyncio.to_thread(read)
    if not found and not await asyncio.to_thread(run.registry.versions, owner, name):
        raise NotFound(f"no model {name}", param="model")
    data = [release_object(name, release) for release in found]
    return json_response({"object": "list", "data": data, "has_more": has_more})


def release_object(name: str, release: Release) -> dict[str, Any]:
    """Return a release as the API shows it."""
    shown = release.model_dump(mode="json", exclude={"format"})
    return {"object": "model.release", "model": name} | shown


def _require_sense(body: ReleaseRequest) -> None:
    content = [field for field in _CONTENT_FIELDS if field in body.model_fields_set]
    if not content and body.rollback_to is None:
        raise InvalidRequest(
            f"name at least one of {', '.join(_CONTENT_FIELDS)} or rollback_to", param="aliases"
        )
    if content and body.rollback_to is not None:
        raise InvalidRequest(
            f"rollback_to takes all of an earlier release; leave {content[0]} out",
            param="rollback_to",
        )
    if any(alias.startswith(CHECKPOINT_PREFIX) for alias in body.aliases):
        raise InvalidRequest(
            f"aliases beginning with {CHECKPOINT_PREFIX!r} mean checkpoints", param="aliases"
        )
    if body.guard is not None:
        _require_limits(body.guard, body.shadow)
    versions = [share.version for share in body.traffic]
    if len(versions) != len(set(versions)):
        raise InvalidRequest("traffic names a version twice", param="traffic")


def _require_limits(guard: Guard, shadow: int | None) -> None:
    """Raise `InvalidRequest` for a guard that could never take its release back."""
    if guard.max_error_rate is None and guard.max_disagreement is None:
        raise InvalidRequest("give max_error_rate, max_disagreement or both", param="guard")
    if guard.max_disagreement is not None and shadow is None:
        raise InvalidRequest("max_disagreement is with a shadow; give one", param="guard")


def _content(body: ReleaseRequest, current: ReleaseContent | None) -> ReleaseContent:
    named = {**(current.aliases if current else {}), **body.aliases}
    aliases = {alias: version for alias, version in named.items() if version is not None}
    if len(aliases) > MAX_ALIASES:
        raise InvalidRequest(f"a model has at most {MAX_ALIASES} aliases", param="aliases")
    if PRODUCTION not in aliases:
        for field in ("traffic", "shadow", "guard"):
            if getattr(body, field):
                raise InvalidRequest(
                    f"{field} is for what {PRODUCTION!r} answers; give aliases.{PRODUCTION}",
                    param="aliases",
                )
    if body.guard is not None and current is None:
        raise InvalidRequest("there is no release before this one to go back to", param="guard")
    return ReleaseContent(
        aliases=aliases, traffic=body.traffic, shadow=body.shadow, guard=body.guard
    )


_CONTENT_FIELDS = ("aliases", "traffic", "shadow", "guard")
