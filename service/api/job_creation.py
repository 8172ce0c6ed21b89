"""Making a fine-tune job: what is checked of a request, and that a repeated one makes no second.

Not here: the routes (service.api.jobs), how a repeat is known (service.idempotency), and the
preview of a job (service.api.dry_run), which shares the checks below.
"""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request

from core.backbones import AUTO, BACKBONES, allowed, is_allowed
from core.datasets import DatasetManifest, FileErrors, Task
from core.errors import DataError, InvalidRequest, NotFound
from core.estimate import estimate
from core.identifiers import new_id
from core.jobs import FineTuneRequest, Job, JobKind, NewJob
from core.manifests import ModelManifest
from core.parents import find_parent
from core.settings import Settings
from core.tasks import find_mismatch, find_other_task, find_refusal
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
    parent = await asyncio.to_thread(parent_of, run, owner, wanted.model)
    backbone = parent.backbone if parent else wanted.model
    check_model(backbone, run.settings)
    check_precision(backbone, wanted.precision)
    check_suffix(wanted.suffix)
    if parent is not None:
        wanted = continuing(wanted, parent)
    manifests: dict[str, DatasetManifest] = {}
    waits_for = []
    for param in FILE_PARAMS:
        file_id = getattr(wanted, param)
        if file_id is None:
            continue
        manifest = await _parsed(run, owner, file_id, param)
        if manifest is not None:
            manifests[param] = manifest
        else:
            await start_ingest(run, owner, file_id)
            waits_for.append(ingest_job_id(file_id))
    check_data(wanted, manifests.get("training_file"), manifests.get("validation_file"), parent)
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


def parent_of(run: Runtime, owner: str, model: str) -> ModelManifest | None:
    """Return the version that a job continues; None also for what `check_model` will refuse.

    Raises `InvalidRequest` for a checkpoint.
    """
    try:
        return find_parent(run.registry, owner, model)
    except NotFound:
        return None


def continuing(wanted: FineTuneRequest, parent: ModelManifest) -> FineTuneRequest:
    """Return the request with the version that it continues, and that one's name unless given.

    Pinned now: a later release must not change what a waiting job continues.
    """
    suffix, order = wanted.suffix or parent.name, wanted.order
    if order is None and parent.task is Task.ORDINAL:
        order = tuple(parent.labels)
    return wanted.model_copy(update={"model": parent.reference, "suffix": suffix, "order": order})


def check_data(
    wanted: FineTuneRequest, train: DatasetManifest | None, held_out: DatasetManifest | None,
    parent: ModelManifest | None,
) -> None:  # fmt: skip
    """Raise `InvalidRequest` for a job that cannot be done on its data, as far as it is known.

    Of a continued model the classes are those of all its files, which the worker reads.
    """
    if parent is not None and train is not None:
        other_task = find_other_task(parent.task, train)
        if other_task is not None:
            message = f"{parent.reference} cannot be continued: {other_task}"
            raise InvalidRequest(message, param="model")
        counts = dict.fromkeys({*train.counts, *parent.labels}, 1)
        train = train.model_copy(update={"counts": counts})
    refusal = find_refusal(wanted, train)
    if refusal is not None:
        raise InvalidRequest(refusal.message, param=refusal.param)
    if train is not None and held_out is not None:
        mismatch = find_mismatch(train, held_out)
        if mismatch is not None:
            raise InvalidRequest(mismatch, param="validation_file", code=DataError.code)


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


async def _parsed(run: Runtime, owner: str, file_id: str, param: str) -> DatasetManifest | None:
    """Return what is in a file, None if it is still to be parsed; raise if it is unusable."""
    files = run.files(owner)
    try:
        await asyncio.to_thread(files.get, file_id)
    except NotFound:
        raise no_file(file_id, param) from None
    _, outcome = await asyncio.to_thread(files.status, file_id)
    if isinstance(outcome, FileErrors):
        raise InvalidRequest(f"{file_id} is unusable: {outcome.summary()}", param=param)
    return outcome


def no_file(file_id: str, param: str) -> InvalidRequest:
    """The refusal of a file that the tenant does not have."""
    return InvalidRequest(f"no file {file_id}", param=param, code="file_not_found")
