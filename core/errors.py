"""Every error that Graft raises on purpose, as one tree.

    GraftError
    ├── InvalidRequest        the caller's input is wrong; `param` names the field
    │   ├── PayloadTooLarge   more bytes, rows, pixels or entries than a limit allows
    │   └── UnsupportedMedia  a content type that is not accepted
    ├── Unauthorized          no key, or a wrong one
    ├── NotFound              no such object for this tenant
    ├── Conflict              the object exists, but its state forbids the operation
    ├── Overloaded            a bounded queue is full; carries `retry_after_seconds`
    ├── DeadlineExceeded      the caller's deadline passed before the answer was ready
    ├── Unavailable           Redis or the artifact store cannot be reached now
    │   └── VersionRefused    a version did not pass its checks; time alone will not mend it
    ├── LeaseLost             a worker wrote with an attempt that is no longer the current one
    ├── AlreadyExists         a create-exclusive write found the object there
    └── JobFailure            a job cannot succeed; `code` is the job's public failure code
        ├── DataError         the data set is unusable
        ├── ExportMismatch    the exported graph disagrees with the one that was trained
        ├── QualityGateFailed the new version is kept, but not good enough to be released
        ├── JobTimeout        the job used up its `max_seconds`
        ├── OutOfMemory       the child was killed for memory, or refused an allocation
        ├── Crashed           the child ended without an answer
        ├── WorkerLost        every attempt's worker disappeared
        └── NoSpace           the disk is full

A message is for the person who sent the request: it never holds a path, a trace or a secret.
HTTP numbers are not here; they live in one table, `service.api.errors`.
"""

from __future__ import annotations

from typing import ClassVar


class GraftError(Exception):
    """Base of the tree. `code` is stable and machine-readable, `param` names the input at fault."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code


class InvalidRequest(GraftError):
    """Raised when the caller's input breaks the contract; the message says how to mend it."""

    code = "invalid_request"


class PayloadTooLarge(InvalidRequest):
    """Raised when an input is larger than a documented limit."""

    code = "payload_too_large"


class UnsupportedMedia(InvalidRequest):
    """Raised when a body or a file has a type that is not accepted."""

    code = "unsupported_media_type"


class Unauthorized(GraftError):
    """Raised when the API key is missing or wrong."""

    code = "invalid_api_key"


class NotFound(GraftError):
    """Raised when the tenant has no such object; another tenant's object looks the same."""

    code = "not_found"


class Conflict(GraftError):
    """Raised when an object's state forbids the operation, such as deleting a file in use."""

    code = "conflict"


class Overloaded(GraftError):
    """Raised when a bounded queue is full; the caller may try again after the time given."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(GraftError):
    """Raised when the deadline of a request passed while it waited or ran."""

    code = "deadline_exceeded"


class Unavailable(GraftError):
    """Raised when Redis or the artifact store does not answer; trying again later may succeed."""

    code = "unavailable"


class VersionRefused(Unavailable):
    """Raised when a version is damaged or not what was published, until it is repaired."""

    code = "version_refused"


class LeaseLost(GraftError):
    """Raised to a worker whose attempt is no longer current; it must stop without publishing."""

    code = "lease_lost"


class AlreadyExists(GraftError):
    """Raised when put-if-absent finds an object under the key."""

    code = "already_exists"


class JobFailure(GraftError):
    """Base of what ends a job as `failed`; trying the same job again would fail the same way."""

    code = "internal_error"


class DataError(JobFailure):
    """Raised when a data set cannot be trained on."""

    code = "data_error"


class ExportMismatch(JobFailure):
    """Raised when ONNX Runtime and torch disagree on a graph beyond the tolerance."""

    code = "export_mismatch"


class QualityGateFailed(JobFailure):
    """Raised when a job was to promote its version and the quality gate did not let it pass."""

    code = "quality_gate"


class JobTimeout(JobFailure):
    """Raised when a job ran longer than it may."""

    code = "timeout"


class OutOfMemory(JobFailure):
    """Raised when the child process ran out of memory."""

    code = "out_of_memory"


class Crashed(JobFailure):
    """Raised when the child process ended without an answer, such as on a segmentation fault."""

    code = "crashed"


class WorkerLost(JobFailure):
    """Raised when the last allowed attempt's worker stopped renewing its lease."""

    code = "worker_lost"


class NoSpace(JobFailure):
    """Raised when the artifact store or the scratch disk has no room left."""

    code = "no_space"


JOB_FAILURES: dict[str, type[JobFailure]] = {
    failure.code: failure
    for failure in (
        DataError, ExportMismatch, QualityGateFailed, JobTimeout, OutOfMemory, Crashed, WorkerLost,
        NoSpace,
    )
}  # fmt: skip
