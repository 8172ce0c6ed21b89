"""Finished jobs in the artifact store: what is left of a job when Redis has forgotten it.

    <tenant>/runs/<job>/events.jsonl   a JobEvent per line, oldest first
    <tenant>/runs/<job>/metrics.csv    a line per `metrics` event, if there were any or it succeeded
    <tenant>/runs/<job>/report.json    of a job that published, even if it was not promoted
    <tenant>/runs/<job>/report.html    the same for people
    <tenant>/runs/<job>/record.json    the Job, written after the others
    <tenant>/runs-by-time/<µs>-<job>   a name without content, by which jobs are listed; comes last

All of it is made from what no longer changes, so that two who archive one job write the same, and
one that is killed half-way is finished by the next. The metrics and the report are also files of
the API, whose ids say which (`result_file_ids`). `publication-<k>.json` in a run's folder belongs
to core.publications, `checkpoints` and `state` to core.checkpoints. Not here: which jobs are to be
archived (core.queue) and by whom (training.archive).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from core.checkpoints import Checkpoints, best_checkpoint
from core.errors import AlreadyExists, Conflict, NotFound, QualityGateFailed
from core.files import FileStore
from core.identifiers import is_identifier
from core.jobs import Job, JobEvent, JobKind, JobStatus
from core.manifests import ModelManifest
from core.registry import Registry
from core.store import ArtifactStore

METRICS, REPORT, REPORT_HTML = "metrics.csv", "report.json", "report.html"
# In this order: a job's id might begin like the end of a longer prefix.
_FILE_ID_PREFIXES = {
    METRICS: "file-metrics-",
    REPORT_HTML: "file-report-html-",
    REPORT: "file-report-",
}


_GONE = b"<!doctype html><title>Report</title><p>The version that it was about was deleted.</p>"


class Place(NamedTuple):
    """Where a job stands among others by age: when it was created, in microseconds, and its id."""

    created_us: int
    id: str

    @classmethod
    def of(cls, job: Job) -> Place:
        """The place of a job."""
        return cls(round(job.created_at * 1_000_000), job.id)


def result_file_ids(job: Job) -> dict[str, str]:
    """Return the ids of a job's result files by their names; only one that published has any."""
    if not _has_published(job):
        return {}
    return {name: prefix + job.id for name, prefix in _FILE_ID_PREFIXES.items()}


def parse_result_file_id(file_id: str) -> tuple[str, str] | None:
    """Return the job's id and the name that a result file's id stands for; None for another's."""
    for name, prefix in _FILE_ID_PREFIXES.items():
        job_id = file_id.removeprefix(prefix)
        if job_id != file_id and is_identifier(job_id):
            return job_id, name
    return None


class RunStore:
    """Writes and reads the finished jobs of all tenants."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._registry = Registry(store)

    def archive(self, job: Job, events: Sequence[JobEvent]) -> None:
        """Store a job that has ended, with its whole history; again, it changes nothing.

        Of a parsing job that failed it is the file that tells.
        """
        if job.kind is JobKind.INGEST:
            reason = job.error.message if job.error else "it could not be parsed"
            FileStore(self._store, job.tenant).give_up(str(job.spec["file"]), reason)
            return
        lines = "".join(event.model_dump_json() + "\n" for event in events)
        folder = _folder(job.tenant, job.id)
        self._put(f"{folder}/events.jsonl", lines.encode())
        for name, data in self.results(job, events).items():
            self._put(f"{folder}/{name}", data)
        self._put(f"{folder}/record.json", job.model_dump_json().encode())
        created_us, job_id = Place.of(job)
        self._put(f"{_index(job.tenant)}/{created_us:016}-{job_id}", b"")

    def tidy(self, job: Job) -> None:
        """Remove what a job that has ended leaves behind: its states, and what a cancel drops."""
        checkpoints = Checkpoints(self._store, job.tenant, job.id)
        checkpoints.drop_states()
        checkpoints.drop_unlisted()
        if job.status is JobStatus.CANCELLED:
            checkpoints.drop([each.step for each in self.checkpoints(job) if each.step is not None])

    def checkpoints(self, job: Job) -> list[ModelManifest]:
        """Return the checkpoints that a job has, or is to keep, ascending by step."""
        found = Checkpoints(self._store, job.tenant, job.id).list()
        if job.status is not JobStatus.CANCELLED:
            return found
        best = best_checkpoint(found) if job.keep_best else None
        return [best] if best is not None else []

    def get(self, tenant: str, job_id: str) -> Job | None:
        """Return an archived job's record, or None."""
        try:
            return Job.model_validate_json(
                self._store.get(f"{_folder(tenant, job_id)}/record.json")
            )
        except NotFound:
            return None

    def events(self, tenant: str, job_id: str) -> list[JobEvent]:
        """Return an archived job's events, oldest first; none for an unknown job."""
        try:
            data = self._store.get(f"{_folder(tenant, job_id)}/events.jsonl")
        except NotFound:
            return []
        return [JobEvent.model_validate_json(line) for line in data.splitlines()]

    def places(self, tenant: str) -> list[Place]:
        """Return every archived job of a tenant, newest first, from one listing."""
        found = []
        for entry in self._store.walk(_index(tenant)):
            created, _, job_id = entry.key.rsplit("/", 1)[-1].partition("-")
            if created.isascii() and created.isdigit():
                found.append(Place(int(created), job_id))
        return sorted(found, reverse=True)

    def result(self, tenant: str, job_id: str, name: str) -> bytes:
        """Return a result file of an archived job; raise `NotFound`."""
        return self._store.get(f"{_folder(tenant, job_id)}/{name}")

    def results(self, job: Job, events: Sequence[JobEvent]) -> dict[str, bytes]:
        """Return the result files of a job that has ended, made from its events and its version."""
        measured = [event for event in events if event.type == "metrics"]
        published = _has_published(job)
        files = {METRICS: _metrics_csv(measured)} if measured or published else {}
        return files | (self._reports(job) if published else {})

    def _reports(self, job: Job) -> dict[str, bytes]:
        """The reports beside the version that the job published, or short ones if that is gone."""
        short = json.dumps({"job": job.id, "request": job.spec, "result": job.result}).encode()
        files = {REPORT: short, REPORT_HTML: _GONE}
        manifest = self._registry.publication(job.tenant, job.id)
        for name in files.keys() & manifest.files.keys() if manifest is not None else ():
            assert manifest is not None
            with suppress(NotFound, Conflict):
                files[name] = self._registry.file(manifest, name)
        return files

    def _put(self, key: str, data: bytes) -> None:
        with suppress(AlreadyExists):
            self._store.put_new(key, data)


def _has_published(job: Job) -> bool:
    """Tell if there is a version: a quality gate that was not passed forbids its release only."""
    refused = job.error is not None and job.error.code == QualityGateFailed.code
    return job.status is JobStatus.SUCCEEDED or (job.status is JobStatus.FAILED and refused)


def _folder(tenant: str, job_id: str) -> str:
    return f"{tenant}/runs/{job_id}"


def _index(tenant: str) -> str:
    return f"{tenant}/runs-by-time"


def _metrics_csv(events: Sequence[JobEvent]) -> bytes:
    """One line per event: when, and whatever the events measured, in the order it first came up."""
    rows: list[Mapping[str, object]] = [
        {"created_at": event.created_at}
        | {
            name: value
            for name, value in event.data.items()
            if isinstance(value, int | float | str)
        }
        for event in events
    ]
    columns = dict.fromkeys(["created_at", *(name for row in rows for name in row)])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
