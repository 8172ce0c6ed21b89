"""`POST /v1/fine_tuning/jobs?dry_run=true`: what a job would do, without making one.

The answer has the data as it was validated, every `auto` as it will be used, and an estimate; or
every error that can be found now, with the lines and columns of a bad file. It finds what creating
the job would refuse, and what the worker would refuse later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from core.backbones import AUTO, BACKBONES
from core.datasets import DatasetManifest, FileErrors, FileStatus, UploadedFile
from core.errors import DataError, InvalidRequest, NotFound
from core.estimate import Workload, estimate, memory_bytes
from core.identifiers import is_identifier
from core.jobs import FineTuneRequest, Hyperparameters
from core.manifests import ModelManifest
from core.tasks import task_of
from service.api.errors import error_body
from service.api.files import file_object
from service.api.job_creation import (
    FILE_PARAMS,
    check_data,
    check_model,
    check_precision,
    check_suffix,
    continuing,
    no_file,
    parent_of,
)
from service.api.responses import field_errors, json_response, read_json
from service.runtime import Runtime, runtime, tenant

MAX_ERRORS = 100
"""Errors that one answer names; `error_count` counts all that are known."""


class Finding(BaseModel, frozen=True):
    """One thing that is wrong: with a field of the request or, inside a file, with a row."""

    param: str | None
    code: str
    message: str
    line: int | None = None
    column: str | None = None
    entry: str | None = None


@dataclass
class Findings:
    """All that is wrong with a request; `total` counts also what is not listed."""

    listed: list[Finding] = field(default_factory=list)
    total: int = 0

    def add(self, finding: Finding) -> None:
        """Count a finding, and list it while there is room."""
        self.total += 1
        if len(self.listed) < MAX_ERRORS:
            self.listed.append(finding)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep the refusal of a check instead of raising it."""
        try:
            yield
        except (InvalidRequest, DataError) as error:
            self.add(Finding(param=error.param, code=error.error_code, message=error.message))


@dataclass(frozen=True)
class Source:
    """A file of the request, and its normal form when it has one."""

    file: UploadedFile
    status: FileStatus
    manifest: DatasetManifest | None

    def described(self) -> dict[str, Any]:
        """Return the file as the answer shows it."""
        dataset = file_object(self.file, self.status, self.manifest).get("dataset")
        return {"id": self.file.id, "status": self.status, "dataset": dataset}


async def preview(request: Request) -> Response:
    """Answer what a job would do, or everything that is wrong with the request."""
    run, owner = runtime(request), tenant(request)
    body = await read_json(request)
    findings = Findings()
    wanted = _parse(body, findings)
    fields = body if isinstance(body, dict) else {}
    parent = None
    if isinstance(model := fields.get("model"), str) and model:
        with findings.collecting():
            parent = await asyncio.to_thread(parent_of, run, owner, model)
            model = parent.backbone if parent else model
            check_model(model, run.settings)
            if wanted is not None:
                check_precision(model, wanted.precision)
    if isinstance(suffix := fields.get("suffix"), str):
        with findings.collecting():
            check_suffix(suffix)
    sources: dict[str, Source] = {}
    for param in FILE_PARAMS:
        file_id = fields.get(param)
        if isinstance(file_id, str) and is_identifier(file_id):
            with findings.collecting():
                source = await asyncio.to_thread(_look, run, owner, file_id, param, findings)
                if source is not None:
                    sources[param] = source
    _check_data(model, wanted, parent, sources, findings)
    if wanted is None or findings.total:
        return _refusal(findings)
    work = await asyncio.to_thread(run.appraiser.appraise, owner, wanted)
    return json_response(_answer(wanted, sources, parent, work))


def _parse(body: Any, findings: Findings) -> FineTuneRequest | None:
    try:
        return FineTuneRequest.model_validate(body)
    except ValidationError as error:
        for name, message in field_errors(error):
            param = name.split(".")[0]
            findings.add(
                Finding(param=param, code=InvalidRequest.code, message=f"{name}: {message}")
            )
        return None


def _look(run: Runtime, owner: str, file_id: str, param: str, findings: Findings) -> Source | None:
    files = run.files(owner)
    try:
        file = files.get(file_id)
    except NotFound:
        raise no_file(file_id, param) from None
    status, outcome = files.status(file_id)
    if isinstance(outcome, FileErrors):
        for row in outcome.errors:
            findings.add(
                Finding(
                    param=param,
                    code=DataError.code,
                    message=row.reason,
                    line=row.line,
                    column=row.column,
                    entry=row.entry,
                )
            )
        findings.total += outcome.total - len(outcome.errors)
        return None
    return Source(file, status, outcome)


def _check_data(
    model: object, wanted: FineTuneRequest | None, parent: ModelManifest | None,
    sources: dict[str, Source], findings: Findings,
) -> None:  # fmt: skip
    """Find what the worker would refuse once it has the data (training.pipeline)."""
    train, held_out = (
        source.manifest if (source := sources.get(param)) else None for param in FILE_PARAMS
    )
    if wanted is not None:
        with findings.collecting():
            continued = continuing(wanted, parent) if parent else wanted
            check_data(continued, train, held_out, parent)
    if train is None:
        return
    backbone = BACKBONES.get(model) if isinstance(model, str) else None
    with findings.collecting():
        if backbone is not None and backbone.modality is not train.modality:
            raise DataError(
                f"{backbone.id} reads {backbone.modality}; the training file holds "
                f"{train.modality} rows",
                param="model",
            )


def _refusal(findings: Findings) -> Response:
    shown = "; ".join(finding.message for finding in findings.listed[:10])
    first = findings.listed[0]
    body = error_body(InvalidRequest(shown, param=first.param, code=first.code))
    body |= {
        "errors": [finding.model_dump() for finding in findings.listed],
        "error_count": findings.total,
    }
    return json_response({"error": body}, 400)


def _answer(
    wanted: FineTuneRequest, sources: dict[str, Source], parent: ModelManifest | None,
    work: Workload | None,
) -> dict[str, Any]:  # fmt: skip
    train, held_out = (sources.get(param) for param in FILE_PARAMS)
    assert train is not None
    if parent is not None:
        wanted = continuing(wanted, parent)
    task = task_of(train.manifest, wanted.order) if train.manifest else None
    return {
        "object": "fine_tuning.job.dry_run",
        "continues": {"model": parent.reference, "rows": parent.dataset.rows} if parent else None,
        "task": task,
        "training_file": train.described(),
        "validation_file": held_out.described() if held_out else None,
        "waits_for_files": any(source.manifest is None for source in sources.values()),
        "resolved": _resolved(wanted),
        "estimate": None if work is None or work.is_rough else _estimate(work),
    }


def _resolved(wanted: FineTuneRequest) -> dict[str, Any]:
    """Return the request with every `auto` as it will be used: a convex fit needs none of them.

    What the job itself decides, by measuring, stays `auto` and is named in `measured`.
    """
    given = wanted.hyperparameters or wanted.method.supervised.hyperparameters
    names = list(Hyperparameters.model_fields)
    resolved = wanted.model_dump(
        mode="json", exclude={"hyperparameters", "method", "integrations", "metadata"}
    )
    backbone = BACKBONES.get(wanted.model)
    has_int8 = wanted.strategy != "full" and (backbone is None or backbone.has_int8)
    if wanted.precision == "auto" and not has_int8:
        resolved["precision"] = "fp32"
    trains = wanted.strategy != "feature_extraction"
    without_file = "held_out" if trains else "cross_validation"
    return resolved | {
        "measured": [n for n in ("model", "precision", "strategy") if resolved[n] == AUTO],
        "hyperparameters": given.model_dump(mode="json") if trains else dict.fromkeys(names),
        "ignored": [n for n in names if not trains and getattr(given, n) != "auto"],
        "evaluation": "validation_file" if wanted.validation_file else without_file,
    }


def _estimate(work: Workload) -> dict[str, Any]:
    expected = estimate(work)
    parts = ("features", "fit", "unfreeze", "report")
    return {
        "seconds": _rounded(expected.seconds),
        **{f"{name}_seconds": _rounded(expected.stages.get(name, 0.0)) for name in parts},
        "memory_bytes": memory_bytes(work),
    }


def _rounded(seconds: float) -> float:
    """Two digits are all that an estimate knows."""
    return float(f"{seconds:.2g}")
