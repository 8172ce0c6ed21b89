"""`/v1/files`: uploads, as OpenAI's clients know them.

The service stores the bytes and answers `uploaded`; a worker parses them (training.ingest) and the
status becomes `processed` or `error`. A file's status is read from the artifact store; only that a
parsing job itself failed, such as for want of memory, the queue knows a moment earlier. What a job
made, its metrics and its report, are files too (service.job_history).
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from core.datasets import DatasetManifest, FileErrors, FileStatus, UploadedFile
from core.errors import Conflict, InvalidRequest, NotFound, Overloaded
from core.files import FileStore
from core.identifiers import new_id, require_identifier
from core.jobs import JobKind, JobStatus, NewJob
from service.api.responses import json_response, query_int
from service.ingest import Upload
from service.job_history import RESULTS_PURPOSE
from service.reads import read_each
from service.runtime import Runtime, runtime, tenant

Found = tuple[FileStatus, DatasetManifest | FileErrors | None]

PURPOSE = "fine-tune"
CLOCK_SKEW_SECONDS = 60.0
HTML_HEADERS = {
    # A report quotes texts of whoever wrote the data: should one get through as markup, it can load
    # and run nothing, and not act in the name of whoever reads it.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def ingest_job_id(file_id: str) -> str:
    """The id of the job that parses a file; there is one per file."""
    return f"ingest-{file_id}"


async def start_ingest(run: Runtime, owner: str, file_id: str) -> None:
    """Make sure that a job parses the file; harmless when there is one."""
    await run.queue.enqueue(
        NewJob(
            tenant=owner,
            id=ingest_job_id(file_id),
            kind=JobKind.INGEST,
            spec={"file": file_id},
        )
    )


async def create_file(request: Request) -> Response:
    """POST /v1/files"""
    run, owner = runtime(request), tenant(request)
    files = run.files(owner)
    upload = Upload(
        request.headers.get("content-type", ""),
        request.stream(),
        max_bytes=run.settings.max_upload_bytes,
    )
    file_id = new_id("file")
    await run.store.put_stream(files.upload_key(file_id), upload.chunks())
    try:
        if upload.fields.get("purpose", PURPOSE) != PURPOSE:
            raise InvalidRequest(f"purpose must be '{PURPOSE}'", param="purpose")
        if upload.bytes == 0:
            raise InvalidRequest("the file is empty", param="file")
        file = UploadedFile(
            id=file_id,
            filename=upload.filename or "upload",
            bytes=upload.bytes,
            created_at=time.time(),
        )
        await asyncio.to_thread(files.complete, file)
        await start_ingest(run, owner, file_id)
    except BaseException:
        # A file that nobody would parse must not stay.
        await asyncio.to_thread(files.discard, file_id)
        raise
    return json_response(file_object(file, FileStatus.UPLOADED, None))


async def list_files(request: Request) -> Response:
    """GET /v1/files?after=&limit=&order="""
    run, owner = runtime(request), tenant(request)
    files = run.files(owner)
    limit = query_int(request, "limit", 10_000, low=1, high=10_000)
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", param="order")
    purpose = request.query_params.get("purpose", PURPOSE)
    if purpose == RESULTS_PURPOSE:
        raise InvalidRequest(
            "result files are not listed; a job names its own in `result_files`", param="purpose"
        )
    complete = await _complete_files(files) if purpose == PURPOSE else []
    complete.sort(key=lambda file: (file.created_at, file.id), reverse=order == "desc")
    after = request.query_params.get("after")
    if after is not None:
        ids = [file.id for file in complete]
        if after not in ids:
            raise InvalidRequest("no such file to list after", param="after")
        complete = complete[ids.index(after) + 1 :]
    listed = complete[:limit]
    found = await read_each(files.status, [file.id for file in listed])
    page = [await _object(run, owner, *each) for each in zip(listed, found, strict=True)]
    return json_response(
        {
            "object": "list",
            "data": page,
            "has_more": len(complete) > limit,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
        }
    )


async def get_file(request: Request) -> Response:
    """GET /v1/files/{file_id}"""
    run, owner = runtime(request), tenant(request)
    file_id = _file_id(request)
    if result := await run.history.result_file(owner, file_id):
        return json_response(file_object(result.file, FileStatus.PROCESSED, None))
    file = await asyncio.to_thread(run.files(owner).get, file_id)
    return json_response(await describe(run, owner, file))


async def get_content(request: Request) -> Response:
    """GET /v1/files/{file_id}/content"""
    run, owner = runtime(request), tenant(request)
    files, file_id = run.files(owner), _file_id(request)
    if result := await run.history.result_file(owner, file_id):
        if result.file.filename.endswith(".html"):
            return Response(result.data, media_type="text/html", headers=HTML_HEADERS)
        return Response(result.data, media_type="application/octet-stream")
    file = await asyncio.to_thread(files.get, file_id)
    return StreamingResponse(
        run.store.stream(files.upload_key(file.id)),
        media_type="application/octet-stream",
        headers={"Content-Length": str(file.bytes)},
    )


async def delete_file(request: Request) -> Response:
    """DELETE /v1/files/{file_id}"""
    run, owner = runtime(request), tenant(request)
    files, file_id = run.files(owner), _file_id(request)
    if await run.history.result_file(owner, file_id):
        raise Conflict(f"{file_id} belongs to the record of its job", param="file_id")
    file = await asyncio.to_thread(files.get, file_id)
    user = await _job_using(run, owner, file)
    if user is not None:
        raise Conflict(f"{file.id} is used by {user}; cancel that job first", param="file_id")
    await asyncio.to_thread(files.delete, file.id)
    return json_response({"id": file.id, "object": "file", "deleted": True})


async def describe(run: Runtime, owner: str, file: UploadedFile) -> dict[str, Any]:
    """Return the API's object of a file, with its present status."""
    found = await asyncio.to_thread(run.files(owner).status, file.id)
    return await _object(run, owner, file, found)


async def _object(run: Runtime, owner: str, file: UploadedFile, found: Found) -> dict[str, Any]:
    status, outcome = found
    described = file_object(file, status, outcome)
    if status is FileStatus.UPLOADED:
        job = await run.queue.get(owner, ingest_job_id(file.id))
        if job is None:
            # Redis came back empty, and whoever waits for the file would wait for ever.
            with suppress(Overloaded):
                await start_ingest(run, owner, file.id)
        elif job.status is JobStatus.FAILED and job.error is not None:
            described |= {"status": FileStatus.ERROR, "status_details": job.error.message}
    return described


def file_object(
    file: UploadedFile, status: FileStatus, outcome: DatasetManifest | FileErrors | None
) -> dict[str, Any]:
    """Return OpenAI's file object, with what Graft found in the file."""
    details = outcome.summary() if isinstance(outcome, FileErrors) else None
    described: dict[str, Any] = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": status,
        "status_details": details,
    }
    if isinstance(outcome, FileErrors):
        described["errors"] = [error.model_dump() for error in outcome.errors]
        described["error_count"] = outcome.total
    elif outcome is not None:
        described["dataset"] = {
            "modality": outcome.modality,
            "task": outcome.task,
            "rows": outcome.rows,
            "classes": len(outcome.counts),
            "counts": outcome.counts,
        }
        if outcome.values is not None:
            described["dataset"]["values"] = outcome.values.model_dump()
        if outcome.unreadable:
            described["errors"] = [error.model_dump() for error in outcome.unreadable]
            described["error_count"] = len(outcome.unreadable)
    return described


def _file_id(request: Request) -> str:
    file_id: str = request.path_params["file_id"]
    return require_identifier(file_id, param="file_id")


async def _complete_files(files: FileStore) -> list[UploadedFile]:
    def get(file_id: str) -> UploadedFile | None:
        try:
            return files.get(file_id)
        except NotFound:
            return None  # still uploading, or abandoned

    found = await read_each(get, await asyncio.to_thread(files.ids))
    return [file for file in found if file is not None]


async def _job_using(run: Runtime, owner: str, file: UploadedFile) -> str | None:
    """Return an unfinished job that reads the file, or None."""
    after = None
    # Jobs come newest first, and none that is older than the file can have named it, give or take
    # the difference between this machine's clock and Redis's.
    while page := await run.queue.list(owner, JobKind.FINE_TUNE, after=after, limit=100):
        for job in page:
            names = (job.spec.get("training_file"), job.spec.get("validation_file"))
            if not job.status.is_terminal and file.id in names:
                return job.id
        if page[-1].created_at < file.created_at - CLOCK_SKEW_SECONDS:
            return None
        after = page[-1].id
    return None
