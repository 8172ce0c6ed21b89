"""The child's main: get ready, take one job from standard input, run it, say how it ended.

Standard output carries messages only (training.process); whatever a library prints goes to standard
error. Untrusted uploads are parsed here, so an `ingest` child first limits its own memory.
Not here: what the stages of a job are (training.pipeline, training.ingest).
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pydantic import BaseModel

from core.datasets import FileErrors
from core.errors import (
    AlreadyExists,
    DataError,
    GraftError,
    NoSpace,
    OutOfMemory,
    Unavailable,
)
from core.files import FileStore
from core.jobs import EventLevel, Failure, Job, JobKind, Json, StopReason
from core.outlook import Progress
from core.settings import Settings
from core.store import ArtifactStore
from training.process import (
    ANSWERS,
    READY,
    AskMessage,
    EventMessage,
    FailedMessage,
    GoMessage,
    ProgressMessage,
    RetryMessage,
    StoppedMessage,
    SucceededMessage,
    end_with_supervisor,
)
from training.stopping import Stopped

if TYPE_CHECKING:  # a child that parses files is better off without ONNX Runtime
    from core.trunk import Trunk


class Reporter:
    """A job's line to its supervisor: events, progress, leave to publish, and being stopped."""

    def __init__(self, messages: BinaryIO, answers: BinaryIO) -> None:
        self._messages = messages
        self._answers = answers
        self._answered = threading.Semaphore(0)
        self._stop_reason: StopReason | None = None
        self._has_leave = False
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the job is to stop; None until it was asked to, and once it has leave to publish."""
        return self._stop_reason

    def check(self) -> None:
        """Raise `Stopped` if the job was asked to stop; to be called between two steps."""
        if self._stop_reason is not None:
            raise Stopped(self._stop_reason)

    def event(self, type: str, message: str, *, level: EventLevel = "info", **data: object) -> None:
        """Add a line to the job's history."""
        self.send(EventMessage(event=type, level=level, message=message, data=_json(data)))

    def progress(self, stage: str, fraction: float) -> None:
        """Say how far the whole job is, 0 to 1, and in which stage."""
        self.send(ProgressMessage(progress=Progress(stage=stage, fraction=min(1.0, fraction))))

    def authorise(self) -> None:
        """Wait for leave to publish, or raise `Stopped`; with a lost lease it never returns."""
        self.check()
        self.send(AskMessage())
        self._answered.acquire()
        self.check()

    def send(self, message: BaseModel) -> None:
        """Write one message."""
        self._messages.write(message.model_dump_json().encode() + b"\n")
        self._messages.flush()

    def _listen(self) -> None:
        for line in iter(self._answers.readline, b""):
            answer = ANSWERS.validate_json(line)
            if isinstance(answer, GoMessage):
                self._has_leave = True
            elif not self._has_leave:
                self._stop_reason = answer.reason
            self._answered.release()
        # The supervisor is gone: nobody renews the lease, so nothing of this may be published.
        os._exit(1)


def _json(data: dict[str, object]) -> Json:
    return EventMessage.model_validate({"event": "", "message": "", "data": data}).data


def limit_memory(extra_bytes: int) -> None:
    """Let this process allocate at most `extra_bytes` of address space more than it has now."""
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[0]) if statm.exists() else 0  # macOS has none
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(
    job: Job, settings: Settings, reporter: Reporter, trunk: Trunk | None = None
) -> SucceededMessage:
    """Run one job; what it raises is translated by `main`."""
    store = ArtifactStore(settings.store_url)
    if job.kind is JobKind.INGEST:
        from training.ingest import Limits, ingest

        limit_memory(settings.ingest_memory_bytes)
        file_id = str(job.spec["file"])
        outcome = ingest(FileStore(store, job.tenant), file_id, Limits.from_settings(settings))
        if isinstance(outcome, FileErrors):
            raise DataError(outcome.summary(), param="training_file")
        return SucceededMessage(result=outcome.model_dump(mode="json"))

    from training.pipeline import fine_tune

    manifest = fine_tune(job, store, settings, reporter, trunk)
    return SucceededMessage(
        result={"fine_tuned_model": manifest.reference, "metrics": dict(manifest.metrics)},
        model=manifest.name,
        version=manifest.version,
    )


def outcome_of(error: BaseException) -> FailedMessage | RetryMessage | StoppedMessage:
    """Sort an exception into a stop, what would fail again and what may pass."""
    match error:
        case Stopped():
            return StoppedMessage(reason=error.reason)
        case MemoryError():
            failure = OutOfMemory("the job needed more memory than it may have")
            return FailedMessage(failure=_failure(failure))
        case NoSpace() | Unavailable() | AlreadyExists():
            return RetryMessage(failure=_failure(error))
        case GraftError():
            return FailedMessage(failure=_failure(error))
        case _:
            # Unforeseen: the trace goes to the worker's log, never into the answer.
            return RetryMessage(
                failure=Failure(code="crashed", message="the job ended on an unexpected error")
            )


def _failure(error: GraftError) -> Failure:
    return Failure(code=error.error_code, message=error.message, param=error.param)


def main() -> None:
    """Run one job of the kind given as the first argument, perhaps on the model that comes next."""
    end_with_supervisor()
    kind = JobKind(sys.argv[1])
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The import is the slow part; a spare child has done it before its job comes.
    if kind is JobKind.INGEST:
        import training.ingest
    else:
        import training.pipeline  # noqa: F401
    settings = Settings()
    messages.write(READY)
    messages.flush()
    trunk = None
    if kind is JobKind.FINE_TUNE:
        from training.warm_up import warm_up

        trunk = warm_up(settings, sys.argv[2] if len(sys.argv) > 2 else None)
    answers = sys.stdin.buffer
    line = answers.readline()
    if not line:
        return
    job = Job.model_validate_json(line)
    reporter = Reporter(messages, answers)
    begun = time.monotonic()
    try:
        done = run(job, settings, reporter, trunk)
        reporter.send(done.model_copy(update={"seconds": time.monotonic() - begun}))
    except BaseException as error:
        outcome = outcome_of(error)
        if isinstance(outcome, RetryMessage):
            sys.excepthook(type(error), error, error.__traceback__)
        reporter.send(outcome)
    # Daemon threads of libraries may hang in their own teardown; everything is stored by now.
    messages.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
