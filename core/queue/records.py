"""How jobs and events look as the text fields of a Redis hash and of a stream entry.

A field that is missing is None, empty or the default. The time of an event is that of its id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from core.errors import Conflict, InvalidRequest
from core.jobs import Failure, Job, JobEvent, JobStatus, Json

_JSON_FIELDS = ("spec", "estimate", "progress", "result", "error")
_REFUSALS = {
    "cancelling": "The job is being cancelled.",
    "publishing": "The job is publishing its model and can no longer be paused.",
    "pausing": "The job is still being paused; resume it when it is.",
}
_EVENT_ID = re.compile(r"[0-9]{1,15}-[0-9]{1,15}")


def encode(data: Json) -> str:
    """Return compact JSON text; raise `ValueError` for NaN and infinities."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def decode_job(tenant: str, job_id: str, record: Mapping[str, str] | Sequence[str]) -> Job:
    """Return the job of a hash, given as a mapping or as the flat list that a script returns."""
    if not isinstance(record, Mapping):
        record = dict(zip(record[::2], record[1::2], strict=True))
    structured = {name: json.loads(record[name]) for name in _JSON_FIELDS if name in record}
    return Job.model_validate({**record, **structured, "tenant": tenant, "id": job_id})


def decode_event(event_id: str, fields: Mapping[str, str]) -> JobEvent:
    """Return the event of a stream entry."""
    return JobEvent.model_validate({
        **fields,
        "id": event_id,
        "created_at": int(event_id.partition("-")[0]) / 1000,
        "data": json.loads(fields.get("data", "{}")),
    })  # fmt: skip


def require_event_id(text: str) -> str:
    """Return `text` if it is the id of an event; raise `InvalidRequest` otherwise."""
    if _EVENT_ID.fullmatch(text) is None:
        raise InvalidRequest("after must be the id of an event", param="after")
    return text


def key_reused() -> Conflict:
    """The refusal of a request that has the name of another one."""
    return Conflict(
        "this Idempotency-Key was used for a request with another body; take a new key",
        param="Idempotency-Key", code="idempotency_key_reused",
    )  # fmt: skip


def refused(status: str, why: str = "") -> Conflict:
    """The refusal of what a job's status, or what is under way, does not allow."""
    if why:
        return Conflict(_REFUSALS[why])
    terminal = JobStatus(status).is_terminal
    return Conflict(f"The job is already {status}." if terminal else "The job is not paused.")


def job_forgotten(job_id: str) -> Conflict:
    """The refusal of a repeated request whose job is gone: a second one must not be made."""
    return Conflict(f"the request was made before, and its job {job_id} is no longer kept")


def ending(
    status: JobStatus, result: Json | None, error: Failure | None
) -> tuple[JobStatus, str, str]:
    """Return a settlement as text; raise `ValueError` unless `failed` and an error go together."""
    if not status.is_terminal:
        raise ValueError(f"{status} is not a terminal status")
    if (status is JobStatus.FAILED) != (error is not None):
        raise ValueError("a failed job, and no other, has an error")
    result_text = encode(result) if result is not None else ""
    return status, result_text, error.model_dump_json() if error else ""
