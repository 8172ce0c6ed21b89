"""`/v1/fine_tuning/jobs`: fine-tune jobs, as OpenAI's clients know them.

A job may be created before its files are parsed: it waits in `validating_files`, and fails with the
file's errors if they turn out unusable. Events are paged newest first, or streamed oldest first as
server-sent events whose ids a client may resume from. Not here: what changes a job
(service.api.job_control), its checkpoints (service.api.checkpoints).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import orjson
from pydantic import JsonValue
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from core.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from core.identifiers import require_identifier
from core.jobs import Job, JobEvent, JobStatus
from core.runs import REPORT, REPORT_HTML, result_file_ids
from service.api import dry_run, job_creation, job_filter
from service.api.responses import json_response, query_bool, query_int
from service.idempotency import REPLAYED_HEADER
from service.runtime import Runtime, runtime, tenant

STREAM_WAIT_SECONDS = 10.0
MAX_STREAMS = 100
"""Event streams of one process."""
_STREAMS = asyncio.Semaphore(MAX_STREAMS)
_EVENT_ID = re.compile(r"[0-9]{1,15}-[0-9]{1,15}")


async def create_job(request: Request) -> Response:
    """POST /v1/fine_tuning/jobs?dry_run="""
    if query_bool(request, "dry_run"):
        return await dry_run.preview(request)
    job, is_repeat = await job_creation.create(request)
    headers = {REPLAYED_HEADER: "true"} if is_repeat else None
    return json_response(await describe(runtime(request), job), headers=headers)


async def list_jobs(request: Request) -> Response:
    """GET /v1/fine_tuning/jobs?after=&limit=&metadata[k]="""
    run, owner = runtime(request), tenant(request)
    limit = query_int(request, "limit", 20, low=1, high=100)
    after = _cursor(request, "after")
    wanted = job_filter.metadata_filter(request)
    if wanted is None:
        found = await run.history.list(owner, after=after, limit=limit + 1)
        page = job_filter.Page(found[:limit], has_more=len(found) > limit)
    else:
        page = await job_filter.search(run.history, owner, wanted, after=after, limit=limit)
    listed = {
        "object": "list",
        "data": [await describe(run, job) for job in page.jobs],
        "has_more": page.has_more,
    }
    return json_response(listed | ({"scanned_to": page.scanned_to} if page.scanned_to else {}))


async def get_job(request: Request) -> Response:
    """GET /v1/fine_tuning/jobs/{job_id}"""
    run = runtime(request)
    return json_response(await describe(run, await find_job(request)))


async def list_events(request: Request) -> Response:
    """GET /v1/fine_tuning/jobs/{job_id}/events, paged or streamed"""
    run = runtime(request)
    job = await find_job(request)
    last_seen = request.headers.get("last-event-id")
    cursor = _event_cursor(request.query_params.get("after"), "after")
    wants_stream = query_bool(request, "stream")
    if wants_stream or "text/event-stream" in request.headers.get("accept", ""):
        return EventStream(
            _stream(run, job, _event_cursor(last_seen, "Last-Event-ID") or cursor),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    limit = query_int(request, "limit", 20, low=1, high=100)
    events = await run.history.events(job, after=cursor, limit=limit + 1, newest_first=True)
    page = [event_object(event) for event in events[:limit]]
    return json_response({"object": "list", "data": page, "has_more": len(events) > limit})


class EventStream(StreamingResponse):
    """A stream of events; raises `Overloaded` instead when too many are open."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        if _STREAMS.locked():
            raise Overloaded("too many event streams are open", retry_after_seconds=5)
        async with _STREAMS:
            await super().__call__(scope, receive, send)


async def _stream(run: Runtime, job: Job, after: str | None) -> AsyncIterator[bytes]:
    """Yield server-sent events until the job's last one."""
    while True:
        try:
            events = await run.history.wait_events(job, after, STREAM_WAIT_SECONDS)
            current = job if events else await run.history.get(job.tenant, job.id)
        except Unavailable:
            return  # the client reconnects with the last id it saw
        for event in events:
            after = event.id
            yield _server_sent(event)
            if _ends(event):
                return
        if not events:
            if current is None or job.status.is_terminal:
                return  # resumed behind the last event
            job = current
            yield b": still here\n\n"


def _server_sent(event: JobEvent) -> bytes:
    described = event_object(event)
    head = f"id: {described['id']}\nevent: {event.type}\ndata: "
    return head.encode() + orjson.dumps(described) + b"\n\n"


def _ends(event: JobEvent) -> bool:
    return event.type in {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}


async def describe(run: Runtime, job: Job) -> dict[str, Any]:
    """Return OpenAI's fine-tuning job object, with our additions."""
    described = job_object(job)
    position = await run.queue.position(job) if job.status is JobStatus.QUEUED else None
    forecast = await run.forecaster.forecast(job, position)
    described |= {"queue_position": position, "estimated_start": forecast.estimated_start}
    if job.progress is not None:
        described["progress"]["seconds_remaining"] = forecast.seconds_remaining
    return described


def job_object(job: Job) -> dict[str, Any]:
    """Return the job object as far as the record alone gives it."""
    spec, result, files = job.spec, job.result or {}, result_file_ids(job)
    method = spec["method"]
    assert isinstance(method, dict)
    supervised = method["supervised"]
    assert isinstance(supervised, dict)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": int(job.finished_at) if job.finished_at else None,
        "model": spec["model"],
        "fine_tuned_model": result.get("fine_tuned_model"),
        "organization_id": job.tenant,
        "status": job.status,
        "training_file": spec["training_file"],
        "validation_file": spec["validation_file"],
        "hyperparameters": spec["hyperparameters"] or supervised["hyperparameters"],
        "method": method,
        "seed": spec["seed"],
        "metadata": spec["metadata"],
        "result_files": list(files.values()),
        "trained_tokens": None,
        "error": job.error.model_dump() if job.error else None,
        "suffix": spec["suffix"],
        "strategy": spec["strategy"],
        "precision": spec["precision"],
        "priority": job.priority,
        "max_seconds": spec["max_seconds"],
        "started_at": job.started_at,
        "attempt": job.attempt,
        "cancel_requested": job.cancel_requested,
        "pause_requested": job.pause_requested,
        "stop_reason": _stop_reason(job),
        "progress": job.progress.model_dump() if job.progress else None,
        "queue_position": None,
        "estimated_start": None,
        "metrics": result.get("metrics"),
        "report": files.get(REPORT),
        "report_html": files.get(REPORT_HTML),
    }


def _stop_reason(job: Job) -> JsonValue:
    """Why training stopped before its end: by request, or what a job that succeeded says itself."""
    if job.status in (JobStatus.CANCELLED, JobStatus.PAUSED):
        return job.status.value
    return (job.result or {}).get("stop_reason")


def event_object(event: JobEvent) -> dict[str, Any]:
    """Return OpenAI's event object; `event` is our finer type, `type` the protocol's."""
    return {
        "id": f"ftevent-{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if event.type == "metrics" else "message",
        "event": event.type,
        "data": event.data,
    }


async def find_job(request: Request) -> Job:
    """Return the job that the path names; raise `NotFound`."""
    run, owner = runtime(request), tenant(request)
    job_id = require_identifier(request.path_params["job_id"], param="job_id")
    job = await run.history.get(owner, job_id)
    if job is None:
        raise NotFound(f"no job {job_id}", param="job_id")
    return job


def _cursor(request: Request, name: str) -> str | None:
    text = request.query_params.get(name)
    return None if text is None else require_identifier(text, param=name)


def _event_cursor(text: str | None, param: str) -> str | None:
    if not text:
        return None
    cursor = text.removeprefix("ftevent-")
    if _EVENT_ID.fullmatch(cursor) is None:
        raise InvalidRequest("an event id looks like 'ftevent-1700000000000-0'", param=param)
    return cursor
