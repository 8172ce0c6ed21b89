"""`/v1/models`: the backbones that jobs may start from, and the fine-tuned models.

What exists is read from the registry; whether this process serves it, from the serving set. A page
of many models takes their version numbers from there, too, while the process hears of changes: the
names are listed anew for each page, so a model that has just been published is there.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from core.backbones import BACKBONES, HF_PREFIX, allowed
from core.changes import Change
from core.errors import InvalidRequest, NotFound, Unavailable
from core.identifiers import ModelReference
from core.manifests import ModelManifest
from core.registry import Listing
from service.api.responses import json_response, query_int
from service.runtime import Runtime, runtime, tenant

MAX_LISTED = 1_000


async def list_models(request: Request) -> Response:
    """GET /v1/models: backbones, then fine-tuned models by name"""
    run, owner = runtime(request), tenant(request)
    limit = query_int(request, "limit", MAX_LISTED, low=1, high=MAX_LISTED)
    after = request.query_params.get("after", "")
    # On one thread: thousands of calls to a pool would cost more than what they read.
    tuned = await asyncio.to_thread(_describe_models, run, owner, after, limit + 1)
    backbones = [] if after else [backbone_object(name) for name in allowed(run.settings.hf_models)]
    data = [*backbones, *tuned[:limit]]
    return json_response({"object": "list", "data": data, "has_more": len(tuned) > limit})


async def get_model(request: Request) -> Response:
    """GET /v1/models/{ref}"""
    run, owner = runtime(request), tenant(request)
    name: str = request.path_params["ref"]
    if name in allowed(run.settings.hf_models):
        return json_response(backbone_object(name))
    reference = ModelReference.parse(name)
    manifest = await asyncio.to_thread(run.registry.resolve, owner, reference)
    listing = (await asyncio.to_thread(run.registry.catalogue, owner, reference.name)).get(
        reference.name, Listing((), 0)
    )
    return json_response(
        await asyncio.to_thread(_model_object, run, owner, str(reference), manifest, listing)
    )


async def delete_model(request: Request) -> Response:
    """DELETE /v1/models/{ref}: one version, or with a bare name the whole model"""
    run, owner = runtime(request), tenant(request)
    name: str = request.path_params["ref"]
    if name in BACKBONES or name.startswith(HF_PREFIX):
        raise InvalidRequest("a backbone cannot be deleted", param="model")
    reference = ModelReference.parse(name)
    if ":" in name:
        raise InvalidRequest("delete 'name' or 'name@version', not an alias", param="model")
    await asyncio.to_thread(run.registry.delete, owner, reference.name, reference.version)
    # It is deleted; that others hear of it at once is a courtesy, for they look by themselves.
    with suppress(Unavailable):
        await run.feed.publish(
            Change(tenant=owner, model=reference.name, type="deleted", version=reference.version)
        )
        await run.loader.reconcile_model(owner, reference.name)
    return json_response({"id": name, "object": "model", "deleted": True})


def backbone_object(name: str) -> dict[str, Any]:
    """Return the model object of a backbone."""
    row = BACKBONES.get(name)
    described: dict[str, Any] = {
        "id": name, "object": "model", "created": 0, "owned_by": "graft", "kind": "backbone",
    }  # fmt: skip
    if row is not None:
        described |= {
            "owned_by": row.package,
            "modality": row.modality,
            "dim": row.dim,
            "description": row.description,
            "license": row.license,
        }
    return described


def _describe_models(run: Runtime, owner: str, after: str, limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in run.registry.names(owner):
        if name <= after:
            continue
        listing = _known(run, owner, name) or run.registry.catalogue(owner, name).get(name)
        if listing is None:
            continue  # a name that is no model's any more
        with suppress(NotFound):  # deleted since it was listed
            manifest = run.registry.manifest(owner, name, max(listing.versions))
            found.append(_model_object(run, owner, name, manifest, listing))
        if len(found) == limit:
            break
    return found


def _known(run: Runtime, owner: str, name: str) -> Listing | None:
    """Return what this process has listed of a model, if that is not older than a moment."""
    if not (run.watch.hears_changes and run.loader.current.is_complete):
        return None
    state = run.loader.current.models.get((owner, name))
    return state.listing if state else None


def _model_object(
    run: Runtime, owner: str, id: str, manifest: ModelManifest, listing: Listing
) -> dict[str, Any]:
    release = None
    with suppress(NotFound, ValidationError):
        release = run.registry.releases.read(owner, manifest.name, listing.release)
    state = run.loader.current.models.get((owner, manifest.name))
    return {
        "id": id,
        "object": "model",
        "created": int(manifest.created_at),
        "owned_by": owner,
        "kind": "fine_tuned",
        "version": manifest.version,
        "versions": list(listing.versions),
        "aliases": dict(release.aliases) if release else {},
        "traffic": [share.model_dump() for share in release.traffic] if release else [],
        "shadow": release.shadow if release else None,
        "served": state is not None and manifest.version in state.versions,
        "loaded": (owner, manifest.name, manifest.version) in run.loader.live,
        "refused": state.refused.get(manifest.version) if state else None,
        "modality": manifest.modality,
        "task": manifest.task,
        "labels": manifest.labels,
        "threshold": manifest.threshold,
        "interval": manifest.interval.model_dump() if manifest.interval else None,
        "metrics": manifest.metrics,
        "lineage": {
            "job": manifest.job,
            "backbone": manifest.backbone,
            "trunk": manifest.trunk,
            "dataset": manifest.dataset.model_dump(),
            "training": manifest.training,
        },
    }
