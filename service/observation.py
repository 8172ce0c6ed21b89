"""How one request went: filled in as it passes, read once it has been answered.

The guard makes a `RequestRecord` for each request and keeps it in a context variable, so that the
data plane, which knows nothing of HTTP, can say which model answered and where the time went. From
the record come the metrics by model, the log line and the trace; never the inputs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from core.errors import GraftError
from service.metrics import ModelMeters

STAGES = ("prepare", "queue", "trunk", "head")
"""Tokenise or decode; wait for a batch; the batches of the trunk; the head."""


@dataclass(slots=True)
class Timing:
    """Seconds that one request spent in each stage, and in all; stages follow each other."""

    began: float = field(default_factory=time.monotonic)
    prepare: float = 0.0
    queue: float = 0.0
    trunk: float = 0.0
    head: float = 0.0
    total: float = 0.0

    def stages(self) -> Iterator[tuple[str, float]]:
        """Yield each stage's name and seconds, in order."""
        for stage in STAGES:
            yield stage, getattr(self, stage)

    def milliseconds(self) -> dict[str, float]:
        """Return what an answer shows."""
        shown = {stage: round(seconds * 1000, 3) for stage, seconds in self.stages()}
        return shown | {"total": round(self.total * 1000, 3)}


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request when it has been answered."""

    request_id: str
    method: str = "other"
    route: str = "other"
    status: int = 500
    model: str | None = None
    rows: int = 0
    failed_rows: int = 0
    timing: Timing | None = None


RECORD: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


@dataclass(slots=True)
class Inference:
    """One inference while it runs: what it is told is what will be known of it."""

    timing: Timing
    failed_rows: int = 0


@contextmanager
def observed(reference: str, rows: int, meters: ModelMeters) -> Iterator[Inference]:
    """Measure the block as one inference of a model, and count how it ended."""
    inference = Inference(Timing())
    record = RECORD.get()
    outcome = "internal_error"
    try:
        yield inference
        outcome = "ok"
    except GraftError as error:
        outcome = error.code
        raise
    except BaseException:
        outcome = "abandoned"
        raise
    finally:
        timing = inference.timing
        timing.total = time.monotonic() - timing.began
        # A dozen series cost a tenth of a request: the caller need not wait for them.
        asyncio.get_running_loop().call_soon(_count, meters, outcome, rows, inference)
        if record is not None:
            record.model = reference
            record.rows, record.failed_rows = rows, inference.failed_rows
            record.timing = timing


def _count(meters: ModelMeters, outcome: str, rows: int, inference: Inference) -> None:
    meters.requests(outcome).inc()
    if outcome == "ok":
        timing = inference.timing
        meters.observe(rows, inference.failed_rows, timing.total, timing.stages())
