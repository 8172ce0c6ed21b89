"""`gradual`: unfreeze from the top, one step after another, for as long as it helps.

    frozen head ─▶ deltas on a quarter of the blocks, on more, each judged on held-out rows
                ─▶ the best number of blocks once more, on all rows

One row in three is held out, class by class, and of many rows one in five. A step trains deltas and
classifier on the others over activations cached at its cut and keeps the epoch with the lowest loss
on the held-out rows. It starts from a strongly regularised head: one that is fitted to the end
separates few rows perfectly and leaves no loss to learn from. Its classifier is the one that was
trained along, or one refitted on the features that came out, as the held-out rows prefer;
`strength` is 0 for the former. A step counts if it beats the best so far (training.judgement);
after two steps in a row that do not, the ladder ends. If none counts, the frozen
head ships: on few rows any unfreezing may lose to it (docs/decisions).

The final deltas see all rows, for as many epochs as were best, so no row is left to judge them by:
the numbers quoted are those of the same step on the held-out rows.

Not here: one step's training (training.tuning, training.trainer), the features that are served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.adapters import Adapter
from core.manifests import Slot
from core.preprocessing import FloatArray
from training.backbones import TorchBackbone
from training.fit import Head, IntArray, fit_at
from training.judgement import Judged, fit_apart, hold_out, likelihoods
from training.novelty import unseen_quantiles
from training.plan import Plan
from training.search_state import SearchState, Step, make_step
from training.stopping import Stopped
from training.trainer import Epoch, Recipe, Trainer
from training.tuning import DeltaTask, Rows

MISSES = 2
"""The ladder ends after so many rungs in a row that are not kept: one block may be too few."""

RESERVED_SHARE = 0.2
"""Of the job's time, for what comes after the search: features, export, publishing."""


@dataclass(frozen=True)
class Source:
    """What is trained on: the backbone, its slots, the rows' classes, and frozen features.

    `activations(cut)` computes what enters block `cut`; None if that is too much to keep.
    """

    backbone: TorchBackbone
    slots: Sequence[Slot]
    targets: IntArray
    classes: int
    features: FloatArray
    activations: Callable[[int], Rows | None]


@dataclass(frozen=True)
class Outcome:
    """The ladder's end: what is best on the held-out rows, and deltas trained on all if it is any.

    `head` was trained along with them; None if it is to be refitted with the best step's strength.
    `probabilities` and `targets` are of the rows `held_out`, by the best step, and `distances`
    the quantiles of how far they lie from the others (training.novelty).
    """

    steps: tuple[Step, ...]
    best: Step
    adapter: Adapter | None
    head: Head | None
    probabilities: FloatArray
    targets: IntArray
    held_out: IntArray
    distances: FloatArray


class Watcher(Protocol):
    """Who is told how a search goes, and keeps its state."""

    def check(self) -> None:
        """Raise `Stopped` if the job is to stop."""

    def save(self, step: int, state: bytes) -> None:
        """Keep a state to resume from; `step` counts training steps."""

    def on_epoch(self, blocks: int, number: int, epoch: Epoch, step: int) -> None:
        """Hear of an epoch, after which the state of `step` was saved."""

    def on_stop(self, step: int) -> None:
        """Hear that training stops, and that the state of `step` was saved."""

    def on_step(
        self, step: Step, trained_steps: int, model: Callable[[], tuple[Adapter, Head]]
    ) -> None:
        """Hear of a rung; `model` gives its deltas and classifier, of the training rows only."""


class Gradual:
    """One search; give it the state of an earlier attempt to go on from there."""

    def __init__(
        self, source: Source, plan: Plan, *, seed: int, deadline: float, watcher: Watcher,
        state: bytes | None = None,
    ) -> None:  # fmt: skip
        self._source = source
        self._plan = plan
        self._seed = seed
        self._deadline = deadline
        self._watcher = watcher
        self._at = SearchState() if state is None else SearchState.from_bytes(state)
        self._kept_rows: tuple[int, Rows] | None = None
        held_out = hold_out(source.targets, seed)
        self._train, self._held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self._rank = min(plan.rank, *(min(s.in_dim, s.out_dim) for s in source.slots))

    @property
    def resumed_from(self) -> int:
        """How many training steps an earlier attempt had made."""
        return self._at.saved_at

    def run(self) -> Outcome:
        """Climb the ladder; raises `Stopped` when asked to, with its state saved."""
        truth = self._source.targets[self._held_out]
        frozen = self._judge(self._source.features)
        if not self._at.steps:
            step = make_step(0, 0, frozen, None, truth, 0.0)
            self._keep(step, frozen, self._source.features)
        for blocks in self._plan.ladder(self._cut(0)):
            if any(step.blocks >= blocks for step in self._at.steps):
                continue
            missed = self._at.steps[-MISSES:]
            if len(missed) == MISSES and not any(step.kept for step in missed):
                break
            if not self._affords(blocks):
                break
            rows = self._activations(blocks)
            if rows is None:
                break
            self._climb(blocks, rows, self._at.best, truth)
        best = self._at.best
        adapter, head = self._final(best) if best.blocks else (None, None)
        return Outcome(
            steps=tuple(self._at.steps),
            best=best,
            adapter=adapter,
            head=None if best.strength else head,
            probabilities=self._at.judged[best.blocks],
            targets=truth,
            held_out=self._held_out,
            distances=self._at.distances[best.blocks],
        )

    # -- rungs -------------------------------------------------------------------------------

    def _climb(self, blocks: int, rows: Rows, best: Step, truth: IntArray) -> None:
        began = time.monotonic()
        head = self._start(self._train)
        task = self._task(blocks, head, rows.subset(self._train), rows.subset(self._held_out))
        trainer = Trainer(
            task, self._recipe(self._plan.epochs, patience=self._plan.patience), seed=self._seed
        )
        self._train_task(trainer, blocks)
        features = task.features(rows)
        judged = self._better(task.head(), features, truth)
        seconds = time.monotonic() - began
        before = self._at.judged[best.blocks]
        step = make_step(blocks, trainer.best_epoch, judged, before, truth, seconds)
        self._at.trained_steps += trainer.step
        self._keep(step, judged, features)
        self._watcher.on_step(step, self._at.trained_steps, lambda: (task.adapter(), judged.head))

    def _final(self, best: Step) -> tuple[Adapter, Head]:
        """Train the best rung's deltas and classifier on all rows."""
        rows = self._activations(best.blocks)
        assert rows is not None  # as it was when the rung was climbed
        head = self._start(np.arange(len(self._source.targets)))
        task = self._task(best.blocks, head, rows, None)
        trainer = Trainer(task, self._recipe(max(1, best.epochs), patience=None), seed=self._seed)
        self._train_task(trainer, -best.blocks)
        return task.adapter(), task.head()

    def _train_task(self, trainer: Trainer, blocks: int) -> None:
        """Run a trainer, keeping its state each epoch and when the job is told to stop."""
        if self._at.trainer is not None and self._at.training == blocks:
            trainer.restore(self._at.trainer)
        self._at.training = blocks

        def save_state() -> None:
            self._at.saved_at = self._at.trained_steps + trainer.step
            self._at.trainer = trainer.state()
            self._watcher.save(self._at.saved_at, self._at.to_bytes())

        def on_epoch(epoch: Epoch) -> bool:
            save_state()
            self._watcher.on_epoch(abs(blocks), len(trainer.history), epoch, self._at.saved_at)
            return time.monotonic() < self._deadline

        try:
            trainer.run(check=self._watcher.check, on_epoch=on_epoch)
        except Stopped:
            save_state()
            self._watcher.on_stop(self._at.saved_at)
            raise
        self._at.training = self._at.trainer = None

    def _task(self, blocks: int, head: Head, train: Rows, held_out: Rows | None) -> DeltaTask:
        return DeltaTask(
            self._source.backbone, self._source.slots, self._cut(blocks), self._rank, head,
            train, held_out,
            batch_size=self._plan.batch_size,
            layer_decay=self._plan.layer_decay,
            regularisation=self._plan.regularisation,
            seed=self._seed,
        )  # fmt: skip

    def _recipe(self, epochs: int, *, patience: int | None) -> Recipe:
        return Recipe(epochs=epochs, learning_rate=self._plan.learning_rate, patience=patience)

    def _start(self, rows: IntArray) -> Head:
        """Return the head that some rows' training starts from, on frozen features."""
        return fit_at(
            self._source.features[rows], self._source.targets[rows], self._source.classes,
            self._plan.start_strength,
        )  # fmt: skip

    def _judge(self, features: FloatArray) -> Judged:
        targets = self._source.targets
        return fit_apart(
            features[self._train], targets[self._train],
            features[self._held_out], targets[self._held_out], self._source.classes,
        )  # fmt: skip

    def _better(self, trained: Head, features: FloatArray, truth: IntArray) -> Judged:
        """Return the classifier that suits the held-out rows better: trained along, or refitted.

        Trained features set the training rows so far apart that a refit may be too sure of itself.
        """
        along = Judged(trained, 0.0, trained.predict(features[self._held_out]))
        return max(
            (self._judge(features), along),
            key=lambda judged: float(likelihoods(judged.probabilities, truth).mean()),
        )

    def _activations(self, blocks: int) -> Rows | None:
        """Return what enters the top blocks; the last is kept, for it may be trained on again."""
        if self._kept_rows is None or self._kept_rows[0] != blocks:
            self._kept_rows = None  # two at once may not fit
            rows = self._source.activations(self._cut(blocks))
            self._kept_rows = None if rows is None else (blocks, rows)
        return None if self._kept_rows is None else self._kept_rows[1]

    def _affords(self, blocks: int) -> bool:
        """Tell whether a rung, and the final training if it is the best, will be done in time."""
        last = self._at.steps[-1]
        growth = blocks / last.blocks if last.blocks else 1.0
        return time.monotonic() + last.seconds * growth * 2.25 < self._deadline

    def _cut(self, blocks: int) -> int:
        return 1 + max(slot.block for slot in self._source.slots) - blocks

    def _keep(self, step: Step, judged: Judged, features: FloatArray) -> None:
        self._at.steps.append(step)
        self._at.judged[step.blocks] = judged.probabilities
        self._at.distances[step.blocks] = unseen_quantiles(
            features[self._train], self._source.targets[self._train],
            features[self._held_out], self._source.classes,
        )  # fmt: skip
