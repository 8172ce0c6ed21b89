"""What each route takes and gives: one row per method and path."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import BaseModel

from core.jobs import FineTuneRequest
from service.api.embeddings import EmbeddingsRequest, EmbeddingsResponse
from service.api.inference import messages
from service.api.job_control import CancelRequest
from service.api.releases import ReleaseRequest
from service.openapi import predictions, schemas

JSON = "application/json"
FORM = "multipart/form-data"
BINARY = "application/octet-stream"


@dataclass(frozen=True)
class Operation:
    """A summary, the body and the answer; `media` is the answer's type where it is not JSON.

    `other_media` are types that the answer may have besides. `query` names parameters of the query
    string with what each means. `also` are further types of the request's body.
    """

    summary: str
    answer: type[BaseModel] | list[type[BaseModel]] | None = None
    body: type[BaseModel] | None = None
    media: str = JSON
    other_media: tuple[str, ...] = ()
    query: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    is_open: bool = False


PAGE = {"after": "the id of the last one of the page before", "limit": "how many at most"}
_JOB = "/v1/fine_tuning/jobs/{job_id}"
_MODEL = "/v2/models/{model}"
_PINNED = "/v2/models/{model}/versions/{version}"
_METADATA = Operation("What a model reads and gives", messages.ModelMetadata)
_READY = Operation("Whether a model answers", messages.ModelReady)
_INFER = Operation(
    "Classify texts, images or features",
    messages.InferResponse,
    messages.InferRequest,
    also=(BINARY,),
)

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/predict"): Operation(
        "Classify texts or images",
        predictions.PredictResponse,
        predictions.PredictBody,
        query={
            "model": "for one image as the raw body",
            "top_k": "likewise",
            "explain": "likewise",
        },
        also=("image/jpeg", "image/png", "image/webp"),
    ),
    ("POST", "/v1/embeddings"): Operation(
        "Features of texts or images", EmbeddingsResponse, EmbeddingsRequest
    ),
    ("POST", "/v1/files"): Operation("Upload a data set", schemas.File, also=(FORM,)),
    ("GET", "/v1/files"): Operation(
        "Files, newest first",
        schemas.FileList,
        query=PAGE | {"order": "asc or desc", "purpose": "fine-tune"},
    ),
    ("GET", "/v1/files/{file_id}"): Operation("A file", schemas.File),
    ("DELETE", "/v1/files/{file_id}"): Operation("Delete a file", schemas.Deleted),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        "A file's bytes", media=BINARY, other_media=("text/html",)
    ),
    ("POST", "/v1/fine_tuning/jobs"): Operation(
        "Create a job",
        schemas.FineTuningJob,
        FineTuneRequest,
        query={"dry_run": "true: say what would be done, and do nothing"},
    ),
    ("GET", "/v1/fine_tuning/jobs"): Operation(
        "Jobs, newest first", schemas.FineTuningJobList, query=PAGE
    ),
    ("GET", _JOB): Operation("A job", schemas.FineTuningJob),
    ("POST", _JOB + "/cancel"): Operation("Cancel a job", schemas.FineTuningJob, CancelRequest),
    ("POST", _JOB + "/pause"): Operation("Pause a job", schemas.FineTuningJob),
    ("POST", _JOB + "/resume"): Operation("Resume a paused job", schemas.FineTuningJob),
    ("GET", _JOB + "/checkpoints"): Operation(
        "A job's checkpoints", schemas.CheckpointList, query=PAGE
    ),
    ("GET", _JOB + "/events"): Operation(
        "A job's events, newest first",
        schemas.JobEventList,
        query=PAGE | {"stream": "true: server-sent events, oldest first"},
        other_media=("text/event-stream",),
    ),
    ("GET", "/v1/models"): Operation(
        "Backbones and fine-tuned models", schemas.ModelList, query=PAGE
    ),
    ("GET", "/v1/models/{ref}"): Operation("A model", schemas.Model),
    ("GET", "/v1/models/{ref}/files"): Operation("A model's files", schemas.ModelFileList),
    ("GET", "/v1/models/{ref}/files/{file}"): Operation("One of a model's files", media=BINARY),
    ("DELETE", "/v1/models/{ref}"): Operation("Delete a model or a version", schemas.Deleted),
    ("POST", "/v1/models/{name}/releases"): Operation(
        "Release versions", schemas.ModelRelease, ReleaseRequest
    ),
    ("GET", "/v1/models/{name}/releases"): Operation(
        "Releases, newest first", schemas.ModelReleaseList, query=PAGE
    ),
    ("GET", "/v2"): Operation("What this server is", messages.ServerMetadata),
    ("GET", "/v2/health/live"): Operation("Whether the process answers", messages.ServerLive),
    ("GET", "/v2/health/ready"): Operation("Whether the process is ready", messages.ServerReady),
    ("GET", _MODEL): _METADATA,
    ("GET", _PINNED): _METADATA,
    ("GET", _MODEL + "/ready"): _READY,
    ("GET", _PINNED + "/ready"): _READY,
    ("POST", _MODEL + "/infer"): _INFER,
    ("POST", _PINNED + "/infer"): _INFER,
    ("POST", "/v2/repository/index"): Operation(
        "What is served, and why the rest is not",
        [messages.RepositoryEntry],
        messages.RepositoryIndexRequest,
    ),
    ("POST", "/v2/repository/models/{model}/load"): Operation(
        "Load a model now", messages.Nothing, messages.RepositoryRequest
    ),
    ("POST", "/v2/repository/models/{model}/unload"): Operation(
        "Free a model's memory", messages.Nothing, messages.RepositoryRequest
    ),
    ("GET", "/metrics"): Operation("Metrics for Prometheus", media="text/plain"),
    ("GET", "/openapi.json"): Operation("This document", media=JSON),
    ("GET", "/docs"): Operation("This document as a page", media="text/html"),
    ("GET", "/livez"): Operation("Whether the process answers", schemas.Live, is_open=True),
    ("GET", "/readyz"): Operation("Whether it serves all it should", schemas.Ready, is_open=True),
}
