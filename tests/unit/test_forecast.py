"""Forecasts follow from what is expected of jobs and what was learned, or are None."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import pytest

from core.jobs import Job, JobKind, JobStatus, NewJob
from core.outlook import STAGES, Estimate, Line, Outlook, Progress, Running
from core.presence import Role
from service.forecast import (
    NEXT_CHILD_SECONDS,
    WARM_UP_SECONDS,
    Forecaster,
    schedule,
    seconds_remaining,
)
from tests.twins.memory import MemoryJobQueue

NOW = 1000.0
BETWEEN = NEXT_CHILD_SECONDS + WARM_UP_SECONDS
ROUGH = Estimate(pace="hf", stages={"fit": 60}, is_rough=True)

STAGED = Estimate(pace="minilm", stages={"data": 1, "features": 5, "fit": 2, "report": 2})


def expected(seconds: float) -> Estimate:
    return Estimate(pace="minilm", stages={"features": seconds / 2, "fit": seconds / 2})


def outlook(
    *running: tuple[float, Estimate | None], ratio: float | None = None,
    lines: dict[str, list[Estimate | None]] | None = None, more: int = 0,
) -> Outlook:  # fmt: skip
    return Outlook(
        now=NOW,
        running=tuple(
            Running(
                id="r", claimed_at=at, estimate=each, progress=Progress(stage="fit", fraction=0.62)
            )
            for at, each in running
        ),
        ratios={} if ratio is None else {"minilm": ratio},
        pending={
            tenant: Line(count=len(line) + more, first=tuple(line))
            for tenant, line in (lines or {}).items()
        },
    )


def starts(picture: Outlook, workers: int = 1, tenant: str = "acme", count: int = 1) -> list[float]:
    plan = schedule(picture, workers)
    found = [plan.start(tenant, place) for place in range(count)]
    assert None not in found
    return [round(at - NOW, 1) for at in found if at is not None]


def test_a_free_worker_starts_a_job_at_once() -> None:
    assert starts(outlook(lines={"acme": [expected(9)]})) == [0]
    assert starts(outlook((NOW - 5, expected(10)), lines={"acme": [expected(9)]}), workers=2) == [0]
    assert starts(outlook()) == [0]  # one that the picture does not show yet
    assert starts(outlook(lines={"acme": [None]})) == [0]


def test_those_before_it_take_as_long_as_their_size_says() -> None:
    line = [expected(40), expected(2), expected(7)]
    found = starts(outlook(lines={"acme": line}), count=3)
    assert found == pytest.approx([0, 40 + BETWEEN, 42 + 2 * BETWEEN])
    # One that runs has half of its twenty seconds behind it.
    behind = starts(outlook((NOW - 10, expected(20)), lines={"acme": line}), count=3)
    assert behind == pytest.approx([at + 10 + NEXT_CHILD_SECONDS for at in found])
    # Of two workers, the one that has the short jobs takes them all.
    assert starts(outlook(lines={"acme": line}), workers=2, count=3) == pytest.approx(
        [0, 0, 2 + BETWEEN]
    )


def test_what_was_learned_is_applied() -> None:
    line = [expected(40), expected(1)]
    assert starts(outlook(lines={"acme": line}, ratio=0.5), count=2)[1] == pytest.approx(
        20 + BETWEEN
    )


def test_tenants_take_turns() -> None:
    lines = {"bolt": [expected(30), expected(30)], "acme": [expected(5), expected(5)]}
    found = starts(outlook(lines=lines), count=2)
    assert found == pytest.approx([30 + BETWEEN, 65 + 3 * BETWEEN])


def test_what_is_too_far_behind_to_be_told_counts_like_the_others() -> None:
    line = [expected(10), expected(30)]
    far = schedule(outlook(lines={"acme": line}, more=100), workers=2).start("acme", 2 + 10)
    assert far == pytest.approx(NOW + 10 + BETWEEN + 10 * (20 + BETWEEN) / 2, abs=0.1)


def test_unknown_jobs_count_like_the_others_and_alone_tell_nothing() -> None:
    line = [expected(10), None, ROUGH, expected(30)]
    found = starts(outlook(lines={"acme": line}), count=4)
    gaps = [b - a for a, b in pairwise(found)]
    assert gaps == pytest.approx([10 + BETWEEN, 20 + BETWEEN, 20 + BETWEEN])
    alone = schedule(outlook(lines={"acme": [None, ROUGH, None]}), workers=1)
    assert [alone.start("acme", place) for place in range(4)] == [NOW, None, None, None]
    assert schedule(outlook(lines={"acme": [expected(1)]}), workers=0).start("acme", 0) is None


@dataclass(frozen=True)
class Case:
    """Whether a running job is where it is expected to be, and what is left of it."""

    name: str
    elapsed: float
    progress: Progress | None
    seconds: float | None
    estimate: Estimate | None = STAGED
    ratio: float | None = None


HALF_WAY = Progress(stage="features", fraction=(STAGES["features"] + STAGES["inspect"]) / 2)


@pytest.mark.parametrize("case", [
    Case("not begun", 3.0, None, 10.0),
    Case("on time", 3.5, HALF_WAY, 6.5),
    Case("twice as fast as expected", 1.75, HALF_WAY, 0.65 * (6.5 + 1.75)),
    Case("thrice as slow", 10.5, HALF_WAY, 0.65 * (6.5 + 10.5)),
    Case("known to be twice as slow", 7.0, HALF_WAY, 13.0, ratio=2.0),
    Case("in a stage that does not tell", 7.0, Progress(stage="fit", fraction=0.62), 3.0),
    Case("longer in it than expected", 9.0, Progress(stage="fit", fraction=0.62), 0.2 * 11),
    Case("at the end", 10.0, Progress(stage="publish", fraction=0.95), 0.0),
    Case("unknown, half done", 20.0, Progress(stage="fit", fraction=0.5), 20.0, estimate=None),
    Case("unknown, just begun", 20.0, Progress(stage="data", fraction=0.05), None, estimate=None),
    Case("rough", 20.0, Progress(stage="fit", fraction=0.5), 20.0, estimate=ROUGH),
], ids=lambda case: case.name)  # fmt: skip
def test_remaining(case: Case) -> None:
    running = Job(
        tenant="acme", id="j", kind=JobKind.FINE_TUNE, status=JobStatus.RUNNING, spec={},
        created_at=0, claimed_at=NOW - case.elapsed, estimate=case.estimate, progress=case.progress,
    )  # fmt: skip
    found = seconds_remaining(running, outlook(ratio=case.ratio))
    assert found == (case.seconds and pytest.approx(case.seconds, abs=0.06))


class OneWorker:
    """Presence of one worker."""

    async def live(self, role: Role) -> set[str]:
        return {"w"}


@pytest.mark.anyio
async def test_a_job_that_the_last_picture_does_not_show_has_a_new_one() -> None:
    queue = MemoryJobQueue()
    forecaster = Forecaster(queue, OneWorker())  # type: ignore[arg-type]
    began, found = time.time(), []
    for position, seconds in enumerate((40, 1, 1)):
        new = NewJob(
            tenant="acme", id=f"j{position}", kind=JobKind.FINE_TUNE, spec={},
            estimate=expected(seconds),
        )  # fmt: skip
        await queue.enqueue(new)
        job = await queue.get("acme", new.id)
        assert job is not None
        found.append((await forecaster.forecast(job, position)).estimated_start)
    passed = time.time() - began
    assert [(at or 0) - began for at in found] == pytest.approx(
        [0, 40 + BETWEEN, 41 + 2 * BETWEEN], abs=passed + 0.1
    )
