"""Making a fine-tune job: what is checked of a request, and that a repeated one makes no second.

Not here: the routes (service.api.jobs), how a repeat is known (service.idempotency), and the
preview of a job (service.api.dry_run), which shares the checks below.
"""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request

from core.backbones import AUTO, BACKBONES, allowed, is_allowed
from core.datasets import FileErrors, FileStatus
from core.errors import InvalidRequest, NotFound
from core.estimate import estimate
from core.identifiers import ModelReference, new_id
from core.jobs import FineTuneRequest, Job, JobKind, NewJob
from core.manifests import ModelManifest
from core.settings import Settings
from service.api.files import ingest_job_id, start_ingest
from service.api.responses import read_body, read_json
from service.idempotency import identify
from service.runtime import Runtime, runtime, tenant

FILE_PARAMS = ("training_file", "validation_file")


async def create(request: Request) -> tuple[Job, bool]:
    """Return the job, and whether an earlier request had made it."""
    arrived = time.monotonic()
    run, owner = runtime(request), tenant(request)
    wanted = await read_body(request, FineTuneRequest)
    once = identify(
        request.headers, await read_json(request), dedupe_seconds=run.settings.dedupe_seconds
    )
    if once is not None and once.is_repeat:
        # Before the checks: the files may have gone since, but the job is there.
        earlier = await run.queue.recall(owner, once)
        if earlier is not None:
            return earlier, True
    parent = await asyncio.to_thread(find_parent, run, owner, wanted.model)
    backbone = parent.backbone if parent else wanted.model
    check_model(backbone, run.settings)
    check_precision(backbone, wanted.precision)
    check_suffix(wanted.suffix)
    if parent is not None:
        wanted = continuing(wanted, parent)
    waits_for = []
    for param in FILE_PARAMS:
        file_id = getattr(wanted, param)
        if file_id is not None and await _needs_ingest(run, owner, file_id, param):
            await start_ingest(run, owner, file_id)
            waits_for.append(ingest_job_id(file_id))
    # Of a file that is still being parsed, the worker that parses it will know more.
    work = None if waits_for else await asyncio.to_thread(run.appraiser.appraise, owner, wanted)
    if once is not None:
        once = once.model_copy(update={"age_seconds": time.monotonic() - arrived})
    new = NewJob(
        tenant=owner,
        id=new_id("ftjob"),
        kind=JobKind.FINE_TUNE,
        spec=wanted.model_dump(mode="json"),
        priority=wanted.priority,
        after=tuple(dict.fromkeys(waits_for)),
        once=once,
        estimate=estimate(work) if work else None,
    )
    job = await run.queue.enqueue(new)
    return job, job.id != new.id


def find_parent(run: Runtime, owner: str, model: str) -> ModelManifest | None:
    """Return the fine-tuned model that `model` refers to; None for a backbone, or what is neither.

    Raises `InvalidRequest` for a checkpoint, which belongs to its job.
    """
    if model == AUTO or is_allowed(model, run.settings.hf_models):
        return None
    try:
        reference = ModelReference.parse(model)
        parent = run.registry.resolve(owner, reference)
    except (InvalidRequest, NotFound):
        return None
    if parent.step is not None:
        raise InvalidRequest(
            "a job continues a version, such as 'name@3', not a checkpoint", param="model"
        )
    return parent


def continuing(wanted: FineTuneRequest, parent: ModelManifest) -> FineTuneRequest:
    """Return the request with the version that it continues, and that one's name unless given.

    Pinned now: a later release must not change what a waiting job continues.
    """
    suffix = wanted.suffix or parent.name
    return wanted.model_copy(update={"model": parent.reference, "suffix": suffix})


def check_model(model: str, settings: Settings) -> None:
    """Raise `InvalidRequest` for what is neither a backbone that jobs may use nor a model."""
    if model != AUTO and not is_allowed(model, settings.hf_models):
        models = ", ".join(allowed(settings.hf_models))
        raise InvalidRequest(
            f"no backbone or model {model[:80]!r}; use a fine-tuned model, 'auto' or one of: "
            f"{models}",
            param="model", code="model_not_found",
        )  # fmt: skip


def check_precision(model: str, precision: str) -> None:
    """Raise `InvalidRequest` for int8 on a backbone of the table that cannot have it.

    Whether an `hf:` model can have it is known once its trunk is made: its job fails, saying so.
    """
    if precision == "int8" and model in BACKBONES and not BACKBONES[model].has_int8:
        raise InvalidRequest(
            f"{model} has no linear layers in its blocks, which is what int8 makes faster; "
            "use precision 'fp32' or 'auto'",
            param="precision",
        )


def check_suffix(suffix: str | None) -> None:
    """Raise `InvalidRequest` for a name that would hide a backbone."""
    if suffix in BACKBONES or suffix == AUTO:
        raise InvalidRequest(f"{suffix} stands for a backbone", param="suffix")


async def _needs_ingest(run: Runtime, owner: str, file_id: str, param: str) -> bool:
    files = run.files(owner)
    try:
        await asyncio.to_thread(files.get, file_id)
    except NotFound:
        raise no_file(file_id, param) from None
    status, outcome = await asyncio.to_thread(files.status, file_id)
    if isinstance(outcome, FileErrors):
        raise InvalidRequest(f"{file_id} is unusable: {outcome.summary()}", param=param)
    return status is FileStatus.UPLOADED


def no_file(file_id: str, param: str) -> InvalidRequest:
    """The refusal of a file that the tenant does not have."""
    return InvalidRequest(f"no file {file_id}", param=param, code="file_not_found")
