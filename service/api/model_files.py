"""`/v1/models/{ref}/files`: all that a fine-tuned model needs to answer, to be used elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from core.errors import NotFound
from core.identifiers import ModelReference
from core.manifests import ModelManifest
from core.registry import StoredFile
from service.api.responses import json_response
from service.runtime import runtime, tenant


async def list_model_files(request: Request) -> Response:
    """GET /v1/models/{ref}/files"""
    run = runtime(request)
    manifest, files = await _files(request)

    def describe() -> list[dict[str, Any]]:
        return [
            {
                "id": name, "object": "model.file", "sha256": file.sha256,
                "bytes": run.store.size(file.key),
            }
            for name, file in sorted(files.items())
        ]  # fmt: skip

    data = await asyncio.to_thread(describe)
    return json_response({"object": "list", "model": manifest.reference, "data": data})


async def get_model_file(request: Request) -> Response:
    """GET /v1/models/{ref}/files/{file}"""
    run = runtime(request)
    manifest, files = await _files(request)
    name: str = request.path_params["file"]
    if name not in files:
        raise NotFound(f"{manifest.reference} has no such file; it has {', '.join(sorted(files))}")
    size = await asyncio.to_thread(run.store.size, files[name].key)
    if size is None:
        raise NotFound(f"{name} of {manifest.reference} is gone")
    return StreamingResponse(
        run.store.stream(files[name].key),
        media_type="application/octet-stream",
        headers={"Content-Length": str(size)},
    )


async def _files(request: Request) -> tuple[ModelManifest, dict[str, StoredFile]]:
    run, owner = runtime(request), tenant(request)
    reference = ModelReference.parse(request.path_params["ref"])

    def find() -> tuple[ModelManifest, dict[str, StoredFile]]:
        manifest = run.registry.resolve(owner, reference)
        return manifest, run.registry.stored_files(manifest)

    return await asyncio.to_thread(find)
