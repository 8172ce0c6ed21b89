"""`graft train`, `jobs`, `job`, `cancel`, `pause`, `resume`: from a data set to a served model."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cli.client import Client
from cli.datasets import find_source, packed, upload
from cli.failures import CommandError
from cli.follow import Screen
from core.identifiers import require_identifier
from core.jobs import JobStatus

REASON_START = re.compile(r"; (?=line \d|entry '|column '|and \d+ more)")
"""Where one reason ends and the next begins: a reason may hold semicolons of its own."""


@dataclass(frozen=True)
class TrainRequest:
    """What `graft train` was asked for; None means the default that the data suggests."""

    data: Path
    name: str | None = None
    backbone: str | None = None
    validation: Path | None = None
    seed: int | None = None
    strategy: str | None = None
    max_seconds: int | None = None
    order: str | None = None

    def options(self) -> dict[str, object]:
        """The fields of the request that are Graft's own, as far as they were given."""
        order = None if self.order is None else [each.strip() for each in self.order.split(",")]
        given = {"strategy": self.strategy, "max_seconds": self.max_seconds, "order": order}
        return {name: value for name, value in given.items() if value is not None}


def train(client: Client, request: TrainRequest, *, wait: bool, console: Console) -> None:
    """Upload the data, create a job, and unless told otherwise follow it until it is served."""
    source = find_source(request.data)
    validation = find_source(request.validation) if request.validation else None
    name = require_identifier(request.name or source.default_name, param="--name")
    with packed(source) as path:
        training_file = upload(client, path, console).id
    validation_file = None
    if validation is not None:
        with packed(validation) as path:
            validation_file = upload(client, path, console).id
    files = [file_id for file_id in (training_file, validation_file) if file_id]
    try:
        job = client.create_job(
            backbone=request.backbone or source.default_backbone,
            name=name,
            training_file=training_file,
            validation_file=validation_file,
            seed=request.seed,
            options=request.options(),
        )
    except openai.BadRequestError as error:
        # A small file may already have been found unusable.
        reasons = describe_files(client, files)
        if reasons is None:
            raise
        raise CommandError(reasons) from error
    console.print(f"job {job.id} fine-tunes {job.model} as {name}", highlight=False)
    if not wait:
        console.print(f"follow it with: graft job {job.id} --follow", highlight=False)
        return
    follow_job(client, job.id, name, console)


def follow_job(client: Client, job_id: str, label: str, console: Console) -> None:
    """Show a job until its model is served; raise `CommandError` unless it succeeded."""
    with Screen(client, console) as screen:
        job = screen.follow(job_id, label)
    if job["status"] == JobStatus.CANCELLED:
        raise CommandError(f"job {job_id} was cancelled")
    if job["status"] != JobStatus.SUCCEEDED:
        raise CommandError(describe_failure(client, job))
    model = str(job["fine_tuned_model"])
    client.wait_until_served(model)
    console.print(f"[bold]{model}[/] is served", highlight=False)
    for metric, value in (job.get("metrics") or {}).items():
        if isinstance(value, int | float):
            console.print(f"  {metric}: {value:.4g}", highlight=False)
    console.print(f"try it: graft predict {model.partition('@')[0]} INPUT…", highlight=False)


def describe_failure(client: Client, job: dict[str, Any]) -> str:
    """Say why a job failed; for unusable files, with their errors by line."""
    error = job.get("error") or {}
    files = [job[field] for field in ("training_file", "validation_file") if job.get(field)]
    reasons = describe_files(client, files) if error.get("code") == "data_error" else None
    return reasons or f"job {job['id']} failed: {error.get('message', 'no reason was given')}"


def describe_files(client: Client, file_ids: Sequence[str]) -> str | None:
    """List what is wrong with the first unusable file; None when all are usable."""
    for file_id in file_ids:
        file = client.openai.files.retrieve(file_id)
        if file.status == "error" and file.status_details:
            reasons = REASON_START.split(file.status_details)
            return "\n  ".join([f"{file.filename} cannot be trained on:", *reasons])
    return None


def show_jobs(client: Client, limit: int, console: Console) -> None:
    """List the newest jobs."""
    page = client.openai.fine_tuning.jobs.list(limit=limit)
    # An id that is cut off is of no use.
    identifier = Column("job", no_wrap=True, min_width=30)
    created_at = Column("created", no_wrap=True)
    table = Table(identifier, "status", "backbone", "model", created_at, box=SIMPLE_HEAD)
    for job in page.data:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created_at))
        table.add_row(job.id, job.status, job.model, job.fine_tuned_model or "", created)
    console.print(table if page.data else "no jobs yet; `graft train` makes one")


def steer(
    client: Client, job_id: str, action: str, console: Console, *, keep_best: bool = False
) -> None:
    """Cancel, pause or resume a job, and say what became of it."""
    client.steer(job_id, action, {"keep_best": True} if keep_best else None)
    job = client.job(job_id)
    console.print(f"{job_id} is {job['status']}", highlight=False)
    if job.get("cancel_requested") and job["status"] == JobStatus.RUNNING:
        console.print("it stops at its next step", highlight=False)


def save_report(client: Client, job_id: str, path: Path, console: Console) -> None:
    """Write the report of a job that succeeded to a file; `.html` is for people, others JSON."""
    job = client.job(job_id)
    wanted = "report_html" if path.suffix == ".html" else "report"
    if not job.get(wanted):
        raise CommandError(f"job {job_id} has no such report; it is {job['status']}")
    path.write_bytes(client.openai.files.content(str(job[wanted])).content)
    console.print(f"wrote {path}", highlight=False)


def show_job(client: Client, job_id: str, *, follow: bool, console: Console) -> None:
    """Show one job, or follow it when asked to."""
    if follow:
        follow_job(client, job_id, job_id, console)
        return
    job = client.job(job_id)
    table = Table(show_header=False, box=None)
    for field in (
        "id", "status", "stop_reason", "model", "strategy", "fine_tuned_model", "training_file",
        "validation_file", "queue_position", "estimated_start",
    ):  # fmt: skip
        if job.get(field):
            table.add_row(field, escape(str(job[field])))
    for field in ("progress", "metrics", "error"):
        for key, value in (job.get(field) or {}).items():
            if value is not None:
                shown = f"{value:.4g}" if isinstance(value, float) else escape(str(value))
                table.add_row(f"{field}.{key}", shown)
    if job.get("cancel_requested"):
        table.add_row("cancel_requested", "yes")
    console.print(table)
