"""Can tuning the backbone pay? What `strategy: "auto"` asks once the frozen head is fitted.

Not if the frozen head is all but perfect, if there are too few rows to tune with or to judge by, if
the job's time is too short, or if what the frozen blocks give is too much to keep. Otherwise the
search begins (training.gradual), and the frozen head still ships unless it is beaten by more than
one standard error.

Seconds are foreseen from the time that a few rows take through the whole backbone, so this answer,
unlike all others of a job, may differ between machines, as the room on the scratch disk may; the
report has its numbers.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel

from training.fit import Fit
from training.objectives import Objective

ENOUGH_ACCURACY = 0.995
FEWEST_ROWS_PER_CLASS = 6
"""On the median class: with fewer, deltas learn rows instead of classes."""

FEWEST_ROWS = 60
"""One in three judges: from fewer than twenty, no gain can be told from chance."""

BACKWARD_COST = 2.0
"""A training step in forward passes, beside the forward itself."""


class Prospect(BaseModel, frozen=True):
    """Whether to tune and why: a line of the report; numbers that did not matter are None.

    `rows_per_class` is the median, of values that of fifths, of several labels by the rarest.
    """

    tune: bool
    reason: str
    accuracy: float | None = None
    rows_per_class: float | None = None
    seconds_needed: float | None = None
    seconds_left: float | None = None

    @property
    def strategy(self) -> str:
        """What `auto` comes to."""
        return "gradual" if self.tune else "feature_extraction"

    def refused(self, reason: str) -> Prospect:
        """Return the same, but not to tune, for this reason."""
        return self.model_copy(update={"tune": False, "reason": reason})


def weigh(fitted: Fit, objective: Objective, *, has_slots: bool) -> Prospect:
    """Return whether the data allow a gain, time aside."""
    accuracy = objective.score(fitted.out_of_fold, objective.targets).accuracy
    rows = len(objective.groups)
    median = float(np.median(np.unique(objective.groups, return_counts=True)[1]))
    reason = None
    if not has_slots:
        reason = "the backbone has no layers that take deltas"
    elif accuracy is not None and accuracy >= ENOUGH_ACCURACY:
        reason = f"the frozen head is right on {100 * accuracy:.1f} % out of fold"
    elif rows < FEWEST_ROWS:
        reason = f"{rows} rows are too few to judge a gain by"
    elif median < FEWEST_ROWS_PER_CLASS:
        reason = f"{median:g} rows in the median class are too few to tune with"
    return Prospect(
        tune=reason is None,
        reason=reason or "there is room for a gain, and rows to find it with",
        accuracy=accuracy,
        rows_per_class=median,
    )


def afford(prospect: Prospect, *, needed: float, left: float) -> Prospect:
    """Return whether there is time as well, in seconds."""
    numbers = {"seconds_needed": round(needed, 1), "seconds_left": round(left, 1)}
    weighed = prospect.model_copy(update=numbers)
    if prospect.tune and needed > left:
        return weighed.refused(
            f"tuning would take about {needed:.0f} s, and {max(left, 0):.0f} s are left"
        )
    return weighed


def foresee(
    row_seconds: float, rows: int, *, views: int, epochs: int, folds: int, share: float
) -> float:
    """Return the seconds of a first rung, of a share of the blocks, and of its last training.

    `row_seconds` is one row's way through the whole backbone, without gradients.
    """
    training = epochs * share * (1 + BACKWARD_COST)
    return row_seconds * rows * (2 * views + (1 + folds) * training)
