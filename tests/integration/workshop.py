"""Whole jobs in this process, on tiny real trunks: data sets in, reports out, no queue."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass, field
from typing import Any

from core.datasets import FileErrors, UploadedFile
from core.files import FileStore
from core.jobs import EventLevel, FineTuneRequest, Job, JobKind, JobStatus
from core.manifests import ModelManifest
from core.outlook import STAGES
from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from tests.builders import TENANT
from training.ingest import Limits, ingest
from training.pipeline import fine_tune
from training.report import Report


@dataclass
class Recorder:
    """A `Reporter` that keeps the events."""

    events: list[tuple[str, EventLevel, dict[str, Any]]] = field(default_factory=list)

    def event(self, type: str, message: str, *, level: EventLevel = "info", **data: object) -> None:
        self.events.append((type, level, data))

    def check(self) -> None:
        pass

    def progress(self, stage: str, fraction: float) -> None:
        """Forecasts know the stages by this table (service.forecast)."""
        if stage == "features":
            assert STAGES["trunk"] <= fraction <= STAGES["inspect"]
        else:
            assert fraction == STAGES[stage]

    def authorise(self) -> None:
        pass

    def named(self, type: str) -> tuple[EventLevel, dict[str, Any]]:
        return next((level, data) for name, level, data in self.events if name == type)


@dataclass
class Workshop:
    """A store with a tiny Hugging Face model that jobs may use."""

    store: ArtifactStore
    model: str

    def upload_texts(self, file_id: str, rows: list[tuple[str, str]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("text", "label"), *rows])
        self.upload(file_id, "rows.csv", text.getvalue().encode())

    def upload(self, file_id: str, filename: str, data: bytes) -> None:
        files, settings = FileStore(self.store, TENANT), Settings()
        self.store.put_new(files.upload_key(file_id), data)
        files.complete(UploadedFile(id=file_id, filename=filename, bytes=1, created_at=0))
        outcome = ingest(files, file_id, Limits.from_settings(settings))
        assert not isinstance(outcome, FileErrors), outcome

    def run(self, job_id: str, **request: Any) -> tuple[ModelManifest, Recorder]:
        recorder = Recorder()
        asked = {"model": f"hf:{self.model}"} | request
        spec = FineTuneRequest.model_validate(asked).model_dump(mode="json")
        job = Job(
            tenant=TENANT, id=job_id, kind=JobKind.FINE_TUNE, status=JobStatus.RUNNING,
            spec=spec, attempt=1, created_at=time.time(),
        )  # fmt: skip
        settings = Settings(hf_models=(self.model,))
        return fine_tune(job, self.store, settings, recorder), recorder

    def report(self, manifest: ModelManifest) -> Report:
        return Report.model_validate_json(self.file(manifest, "report.json"))

    def file(self, manifest: ModelManifest, name: str) -> bytes:
        return Registry(self.store).file(manifest, name)
