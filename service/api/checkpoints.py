"""`/v1/fine_tuning/jobs/{id}/checkpoints`: the models that a job kept on its way.

Each is named by a model reference that predicts like any other. Newest first, paged like OpenAI's.
Not here: how they are kept (core.checkpoints), and which of them outlast a cancel (core.runs).
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from core.errors import InvalidRequest
from core.jobs import Job
from core.manifests import ModelManifest
from service.api.jobs import find_job
from service.api.responses import json_response, query_int
from service.runtime import runtime


async def list_checkpoints(request: Request) -> Response:
    """GET /v1/fine_tuning/jobs/{job_id}/checkpoints?after=&limit="""
    limit = query_int(request, "limit", 10, low=1, high=100)
    job = await find_job(request)
    found = await asyncio.to_thread(runtime(request).runs.checkpoints, job)
    listed = [checkpoint_object(job, manifest) for manifest in reversed(found)]
    after = request.query_params.get("after")
    if after is not None:
        ids = [each["id"] for each in listed]
        if after not in ids:
            raise InvalidRequest("no such checkpoint to list after", param="after")
        listed = listed[ids.index(after) + 1 :]
    page = listed[:limit]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(listed) > limit,
        }
    )


def checkpoint_object(job: Job, manifest: ModelManifest) -> dict[str, Any]:
    """Return OpenAI's checkpoint object; all of our metrics are beside those it knows."""
    metrics = manifest.metrics
    known = {
        "step": manifest.step,
        "valid_loss": metrics.get("nll"),
        "train_loss": metrics.get("train_loss"),
    }
    return {
        "id": f"ftckpt-{job.id.removeprefix('ftjob-')}-{manifest.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(manifest.created_at),
        "fine_tuned_model_checkpoint": manifest.reference,
        "fine_tuning_job_id": job.id,
        "metrics": {**metrics, **known},
        "step_number": manifest.step,
    }
