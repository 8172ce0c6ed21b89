"""Forecasts follow from what was measured, and are None where nothing was."""

from __future__ import annotations

import pytest

from core.jobs import Job, JobKind, JobStatus, Json, Outlook, Progress, Running
from service.forecast import estimated_start, seconds_remaining

NOW = 1000.0
SPEC: Json = {"model": "minilm", "strategy": "gradual"}
PACES = {"minilm gradual": 60.0}


def job(status: JobStatus = JobStatus.QUEUED, **fields: object) -> Job:
    return Job(
        tenant="acme", id="j", kind=JobKind.FINE_TUNE, status=status, spec=SPEC, created_at=0,
        **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def outlook(*claimed_at: float, paces: dict[str, float] = PACES, **pending: int) -> Outlook:
    running = tuple(Running(id=f"r{at}", spec=SPEC, claimed_at=at) for at in claimed_at)
    return Outlook(now=NOW, running=running, paces=paces, pending=pending or {"acme": 1})


@pytest.mark.parametrize(
    ("position", "workers", "picture", "seconds"),
    [
        (0, 1, outlook(), 0),  # a worker is free
        (0, 1, outlook(NOW - 20), 40),
        (0, 1, outlook(NOW - 90), 0),  # it takes longer than usual: it may end at any moment
        (2, 1, outlook(NOW - 20), 160),
        (0, 2, outlook(NOW - 20), 0),
        (2, 2, outlook(NOW - 20, NOW - 50), 70),
        (1, 2, outlook(NOW - 20, NOW - 50), 40),
        (3, 2, outlook(NOW - 20, NOW - 50), 100),
        (1, 1, outlook(NOW - 20, acme=2, bolt=9), 160),  # bolt's turn comes between
        (0, 1, outlook(NOW - 20, bolt=9, acme=2), 100),
    ],
)
def test_start(position: int, workers: int, picture: Outlook, seconds: float) -> None:
    assert estimated_start(job(), position, picture, workers) == NOW + seconds


def test_start_is_unknown_without_workers_or_measurements() -> None:
    assert estimated_start(job(), 0, outlook(), 0) is None
    assert estimated_start(job(), 0, outlook(NOW - 20, paces={}), 1) is None
    assert estimated_start(job(), 0, outlook(paces={}), 1) == NOW


@pytest.mark.parametrize(
    ("fraction", "said", "claimed_at", "paces", "seconds"),
    [
        (0.5, 7.0, NOW - 20, PACES, 7.0),  # the job knows best
        (0.5, None, NOW - 20, PACES, 40.0),
        (0.5, None, NOW - 90, PACES, 90.0),  # longer than usual: from its progress
        (0.25, None, NOW - 20, {}, 60.0),
        (0.05, None, NOW - 20, {}, None),
        (0.05, None, NOW - 90, PACES, None),
    ],
)
def test_remaining(
    fraction: float, said: float | None, claimed_at: float, paces: dict[str, float],
    seconds: float | None,
) -> None:  # fmt: skip
    progress = Progress(stage="fit", fraction=fraction, seconds_remaining=said)
    running = job(JobStatus.RUNNING, claimed_at=claimed_at, progress=progress)
    assert seconds_remaining(running, outlook(claimed_at, paces=paces)) == seconds
