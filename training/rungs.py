"""What a search trains: a rung's part of the backbone and a classifier, on some of a job's rows.

`Tasks` makes the task of a rung from a `Source`, over what goes into the part, such as activations
at the rung's cut, of which it keeps the last. A task starts from a strongly regularised head of its
own rows on frozen features.

Not here: which rungs, and how they are judged (training.gradual), how a task trains
(training.tuning, training.trainer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import numpy as np

from core.preprocessing import FloatArray
from training.fit import IntArray
from training.objectives import Objective
from training.plan import Plan, Rung
from training.tuning import P, Rows, Tuning

SHARES = (0.5, 1.0)
"""How much of what was trained is judged: half of it overfits less and costs no training."""


@dataclass(frozen=True)
class Source(Generic[P]):
    """What is trained: some of a backbone's `blocks`, for an objective on its rows.

    `part(blocks)` is what there is to train of the top ones, untrained, and `rows(blocks)` what
    goes into it, which raises `NoSpace` if that is too much to keep. `features` are the frozen
    ones. `serve` computes all rows' features as the trunk will; None if they are the same as
    torch's. Between two states that nobody asked for are at least `state_seconds`; if that is
    infinite, none is kept of a training that has not ended. `is_whole` says that there is one part
    only, and it is everything. Rows of the same of `twins` [n] judge together.
    """

    blocks: int
    objective: Objective
    features: FloatArray
    part: Callable[[int], P]
    rows: Callable[[int], Rows]
    serve: Callable[[P], FloatArray] | None = None
    state_seconds: float = 0.0
    is_whole: bool = False
    twins: IntArray | None = None


class Tasks(Generic[P]):
    """Makes the tasks of one search."""

    def __init__(self, source: Source[P], plan: Plan) -> None:
        self._source = source
        self._plan = plan
        self._kept: tuple[int, Rows] | None = None

    @property
    def ladder(self) -> list[int]:
        """How many of the blocks to unfreeze, step by step."""
        blocks = self._source.blocks
        return [blocks] if self._source.is_whole else self._plan.ladder(blocks)

    def rows(self, blocks: int) -> Rows:
        """Return what enters the top blocks; the last is kept, for it may be trained on again.

        Raises `NoSpace` if it is too much to keep.
        """
        if self._kept is None or self._kept[0] != blocks:
            self._kept = None  # two at once may not fit
            self._kept = (blocks, self._source.rows(blocks))
        return self._kept[1]

    def make(
        self, rung: Rung, rows: Rows, train: IntArray, held_out: IntArray | None = None
    ) -> Tuning[P]:
        """Return the training of a rung on the rows of these numbers, of all `rows`."""
        objective = self._source.objective
        head = objective.fit_at(self._source.features[train], train, self._plan.start_strength)
        return Tuning(
            self._source.part(rung.blocks), objective, head,
            rows.subset(train), None if held_out is None else rows.subset(held_out),
            batch_size=self._plan.batch_size,
            regularisation=self._plan.regularisation.model_copy(update={"contrast": rung.contrast}),
        )  # fmt: skip

    def features(self, task: Tuning[P], rows: Rows) -> FloatArray:
        """Return all rows' features with each of the `SHARES`, as they will be served.

        They are float32 [shares, n, dim].
        """
        found = []
        for share in SHARES:
            task.part.set_share(share)
            serve = self._source.serve
            found.append(task.features(rows) if serve is None else serve(task.part))
        return np.stack(found)
