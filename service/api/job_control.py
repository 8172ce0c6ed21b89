"""`/v1/fine_tuning/jobs/{id}/cancel|pause|resume`: what a caller may want of a job.

A waiting job does it at once; a running one has `cancel_requested` or `pause_requested` until its
worker has stopped it between two steps. What a job's state forbids is a 409 that says why.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from core.errors import Conflict
from core.jobs import Job
from service.api.jobs import describe, find_job
from service.api.responses import json_response, read_body
from service.runtime import runtime


class CancelRequest(BaseModel):
    """The body of a cancel, which may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_best: bool = False


async def cancel_job(request: Request) -> Response:
    """POST /v1/fine_tuning/jobs/{job_id}/cancel"""
    run = runtime(request)
    wanted = await read_body(request, CancelRequest) if await request.body() else CancelRequest()
    job = await _unfinished(request)
    cancelled = await run.queue.cancel(job.tenant, job.id, keep_best=wanted.keep_best)
    return json_response(await describe(run, cancelled))


async def pause_job(request: Request) -> Response:
    """POST /v1/fine_tuning/jobs/{job_id}/pause"""
    run, job = runtime(request), await _unfinished(request)
    return json_response(await describe(run, await run.queue.pause(job.tenant, job.id)))


async def resume_job(request: Request) -> Response:
    """POST /v1/fine_tuning/jobs/{job_id}/resume"""
    run, job = runtime(request), await _unfinished(request)
    return json_response(await describe(run, await run.queue.resume(job.tenant, job.id)))


async def _unfinished(request: Request) -> Job:
    job = await find_job(request)
    if job.status.is_terminal:  # Redis may know it no more
        raise Conflict(f"The job is already {job.status}.")
    return job
