"""How far a job is, how long it is expected to take, and what a forecast of all jobs is made from.

Not here: the costs behind an estimate (core.estimate), the forecast itself (service.forecast).
"""

from __future__ import annotations

from pydantic import BaseModel, Field


class Progress(BaseModel, frozen=True):
    """How far a running job is: its stage, the whole job's fraction in 0..1, seconds left."""

    stage: str
    fraction: float = Field(ge=0, le=1)
    seconds_remaining: float | None = None


STAGES = {
    "data": 0.0, "trunk": 0.05, "features": 0.1, "inspect": 0.6, "fit": 0.62, "unfreeze": 0.7,
    "evaluate": 0.85, "report": 0.87, "export": 0.94, "publish": 0.95,
}  # fmt: skip
"""A fine-tune job's stages in order, and the fraction of the job at which each begins."""


class Estimate(BaseModel, frozen=True):
    """How many seconds each of a job's stages is expected to take, by the size of its data.

    `pace` is shared by jobs whose estimates are wrong by about the same factor, which the queue
    learns. While nothing was learned, one that `is_rough` only tells larger jobs from smaller ones.
    """

    pace: str
    stages: dict[str, float]
    is_rough: bool = False

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())


class Running(BaseModel, frozen=True):
    """A running job as a forecast needs it, whoever's it is."""

    id: str
    claimed_at: float
    estimate: Estimate | None = None
    progress: Progress | None = None


class Line(BaseModel, frozen=True):
    """A tenant's pending jobs: how many, and what is expected of the first of them, in order."""

    count: int
    first: tuple[Estimate | None, ...] = ()


class Outlook(BaseModel, frozen=True):
    """What a forecast of one kind of job is made from; `now` is Unix time by the queue's clock.

    `ratios` has by pace how long recent jobs took, divided by their estimates; `pending` has a line
    for each tenant, beginning with the tenant whose turn is next.
    """

    now: float
    running: tuple[Running, ...] = ()
    ratios: dict[str, float] = Field(default_factory=dict)
    pending: dict[str, Line] = Field(default_factory=dict)
