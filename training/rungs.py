"""What a search trains: a rung's deltas and classifier, on some of a job's rows.

`Tasks` makes the task of a rung from a `Source`, over activations at the rung's cut, of which it
keeps the last. A task starts from a strongly regularised head of its own rows on frozen features.

Not here: which rungs, and how they are judged (training.gradual), how a task trains
(training.tuning, training.trainer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from core.adapters import Adapter
from core.manifests import Slot
from core.preprocessing import FloatArray
from training.backbones import TorchBackbone
from training.fit import IntArray, fit_at
from training.plan import Plan, Rung
from training.tuning import DeltaTask, Rows

SHARES = (0.5, 1.0)
"""The parts of trained deltas that are judged: half of them overfits less and costs no training."""


@dataclass(frozen=True)
class Source:
    """What is trained on: the backbone, its slots, the rows' classes, and frozen features.

    `activations(cut)` computes what enters block `cut`; None if that is too much to keep. `serve`
    computes all rows' features as the trunk will with deltas; None if they are the same as torch's.
    """

    backbone: TorchBackbone
    slots: Sequence[Slot]
    targets: IntArray
    classes: int
    features: FloatArray
    activations: Callable[[int], Rows | None]
    serve: Callable[[Adapter], FloatArray] | None = None


class Tasks:
    """Makes the tasks of one search."""

    def __init__(self, source: Source, plan: Plan, seed: int) -> None:
        self._source = source
        self._plan = plan
        self._seed = seed
        self._rank = min(plan.rank, *(min(s.in_dim, s.out_dim) for s in source.slots))
        self._kept: tuple[int, Rows] | None = None
        self.blocks = 1 + max(slot.block for slot in source.slots)

    def activations(self, blocks: int) -> Rows | None:
        """Return what enters the top blocks; the last is kept, for it may be trained on again."""
        if self._kept is None or self._kept[0] != blocks:
            self._kept = None  # two at once may not fit
            rows = self._source.activations(self.blocks - blocks)
            self._kept = None if rows is None else (blocks, rows)
        return None if self._kept is None else self._kept[1]

    def make(
        self, rung: Rung, rows: Rows, train: IntArray, held_out: IntArray | None = None
    ) -> DeltaTask:
        """Return the training of a rung on the rows of these numbers, of all `rows`."""
        head = fit_at(
            self._source.features[train], self._source.targets[train], self._source.classes,
            self._plan.start_strength,
        )  # fmt: skip
        return DeltaTask(
            self._source.backbone, self._source.slots, self.blocks - rung.blocks, self._rank, head,
            rows.subset(train), None if held_out is None else rows.subset(held_out),
            batch_size=self._plan.batch_size,
            layer_decay=self._plan.layer_decay,
            regularisation=self._plan.regularisation.model_copy(update={"contrast": rung.contrast}),
            seed=self._seed,
        )  # fmt: skip

    def features(self, task: DeltaTask, rows: Rows) -> FloatArray:
        """Return all rows' features with each of the `SHARES`, as they will be served.

        They are float32 [shares, n, dim].
        """
        found = []
        for share in SHARES:
            task.set_share(share)
            serve = self._source.serve
            found.append(task.features(rows) if serve is None else serve(task.adapter()))
        return np.stack(found)
