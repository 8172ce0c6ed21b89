"""Every setting of the service and the worker, read once at the entrypoint from the environment.

Each field is the environment variable `GRAFT_<FIELD>`; its description is the README's row for it
(a test compares the two). Hyper-parameters are not settings: they are part of a job.
"""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from core.redis_address import parse_redis_url

MIB = 1 << 20


class Settings(BaseSettings):
    """Settings of both processes. Bytes, seconds and counts as the names say."""

    # An error must not quote what it refuses: that may be a key or a password.
    model_config = SettingsConfigDict(
        env_prefix="GRAFT_", frozen=True, extra="ignore", hide_input_in_errors=True
    )

    store_url: str = Field(
        default="./graft-data/store",
        description="Artifact store: a directory, or `s3://…`, `gs://…`, `az://…`.",
    )
    redis_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey 6.2+: `redis://`, `rediss://`, `unix://`, "
        "`redis+sentinel://` or `redis+cluster://`; see [operations](docs/operations.md).",
    )
    redis_prefix: str = Field(
        default="graft", pattern=r"^[a-z0-9_-]{1,32}$", description="Prefix of every Redis key."
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="Bearer key that guards all but `/livez` and `/readyz`. "
        "Without one the service binds to loopback only.",
    )
    hf_models: tuple[str, ...] = Field(
        default=(),
        description="JSON list of the `hf:` models that jobs may use: "
        "directories, or `org/name@revision`.",
    )
    request_log_fraction: float = Field(
        default=0.01, ge=0, le=1,
        description="Part of the requests that get a line of JSON in the log, besides all that "
        "fail with 5xx; 0 turns it off.",
    )  # fmt: skip
    trace_endpoint: str | None = Field(
        default=None, pattern=r"^https?://",
        description="OTLP/HTTP collector of OpenTelemetry traces, such as "
        "`http://otel:4318/v1/traces`; off without one. "
        "Needs `graft[tracing]`, which the service's image and the Bento have.",
    )  # fmt: skip
    trace_fraction: float = Field(
        default=1, ge=0, le=1, description="Part of the requests that are traced."
    )
    labelled_models: int = Field(
        default=100, ge=0, le=10_000,
        description="Models of a process that have metrics of their own; "
        "the others share the label `other`.",
    )  # fmt: skip
    service_workers: int = Field(default=1, ge=1, le=64, description="Service processes.")
    inference_threads: int = Field(
        default=0, ge=0, le=256,
        description="ONNX Runtime threads of one process; 0 means cores / service workers.",
    )  # fmt: skip
    poll_seconds: float = Field(
        default=5, gt=0, le=3600,
        description="How often a service process looks into the registry, should an event be lost.",
    )  # fmt: skip
    predict_timeout_seconds: float = Field(
        default=10, gt=0, le=300, description="Longest wait of one prediction request."
    )
    max_request_bytes: int = Field(
        default=32 * MIB, ge=1024, description="Largest request body, uploads excepted."
    )
    max_inputs: int = Field(default=256, ge=1, description="Most inputs of one prediction request.")
    max_queued_rows: int = Field(
        default=2048,
        ge=1,
        description="Prediction rows that may wait for one trunk, "
        "and inputs of a process that may wait to be decoded.",
    )
    model_memory_bytes: int = Field(
        default=1024 * MIB, ge=1,
        description="Memory of one service process for loaded heads, and trunks that are one "
        "model's own; trunks that models share come on top.",
    )  # fmt: skip
    pinned_models: tuple[str, ...] = Field(
        default=(),
        description="JSON list of models whose released versions stay loaded whatever the memory.",
    )
    max_upload_bytes: int = Field(default=512 * MIB, ge=1, description="Largest uploaded file.")
    max_rows: int = Field(default=200_000, ge=2, description="Most rows of a data set.")
    max_classes: int = Field(default=1_000, ge=2, description="Most classes of a data set.")
    max_text_chars: int = Field(default=20_000, ge=1, description="Longest text of one row.")
    max_pixels: int = Field(default=25_000_000, ge=1, description="Largest image, in pixels.")
    max_zip_entries: int = Field(default=200_000, ge=1, description="Most entries of a zip file.")
    max_zip_ratio: int = Field(
        default=100, ge=1, description="Largest ratio of unpacked to packed bytes in a zip file."
    )
    max_unpacked_bytes: int = Field(
        default=2048 * MIB, ge=1, description="Most bytes that a file may unpack to."
    )
    ingest_memory_bytes: int = Field(
        default=2048 * MIB, ge=64 * MIB,
        description="Memory that parsing one upload may take beyond the idle child.",
    )  # fmt: skip
    ingest_seconds: int = Field(default=300, ge=1, description="Time that parsing may take.")
    max_queued_jobs: int = Field(
        default=10_000, ge=1, description="Unfinished jobs of one kind that a tenant may have."
    )
    max_running_jobs: int = Field(
        default=0, ge=0,
        description="Jobs of one kind that a tenant may have running at once; 0 means any number.",
    )  # fmt: skip
    # The openai client tries again after at most 8 s, but only once it knows of the loss: a proxy
    # between may wait for 60 s (nginx) before it answers 504.
    dedupe_seconds: int = Field(
        default=120, ge=0, le=3600,
        description="How long a client's automatic retry of a request "
        "gets the job that the first try made; 0 turns it off.",
    )  # fmt: skip
    lease_seconds: float = Field(
        default=5, ge=0.5, le=600,
        description="A worker silent for this long loses its job to another.",
    )  # fmt: skip
    stop_seconds: float = Field(
        default=8, ge=0, le=3600,
        description="How long a job that is paused, or whose worker is stopped, may take to save "
        "its state; less than what stops the worker waits before it kills.",
    )  # fmt: skip
    max_attempts: int = Field(
        default=3, ge=1, le=100,
        description="Lost or failed attempts after which a job fails for good.",
    )  # fmt: skip
    job_retention_seconds: int = Field(
        default=30 * 86_400, ge=60,
        description="How long Redis keeps a finished job that the artifact store has.",
    )  # fmt: skip
    leftover_seconds: float = Field(
        default=3600, ge=1, le=30 * 86_400,
        description="What a crash left in the artifact store is removed "
        "when it has not changed for this long.",
    )  # fmt: skip
    export_when_idle: bool = Field(
        default=True,
        description="Whether a worker without a job exports the trunks of the packaged backbones, "
        "so that embeddings and first jobs need not wait for it.",
    )
    feature_cache_bytes: int = Field(
        default=1024 * MIB, ge=0,
        description="Features that the store keeps for a tenant's later jobs, for each trunk, "
        "and as many bytes of results made of them; 0 keeps none.",
    )  # fmt: skip
    feature_cache_days: int = Field(
        default=30, ge=1, description="How long features and results are kept for later jobs."
    )

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, url: SecretStr) -> SecretStr:
        parse_redis_url(url.get_secret_value())
        return url
