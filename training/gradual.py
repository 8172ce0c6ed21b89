"""`gradual`: unfreeze from the top, one step after another, for as long as it helps.

    frozen head ─▶ deltas on the top 1, 2, 4 … blocks, each judged on held-out rows
                ─▶ the best number of blocks once more, on all rows

One row in five is held out, class by class. A step trains deltas and classifier on the others over
activations cached at its cut and keeps the epoch with the lowest loss on the held-out rows. Its
classifier is the one that was trained along, or one refitted on the features that came out, as the
held-out rows prefer; `strength` is 0 for the former. A step counts if the held-out rows'
log-likelihood, row by row, is better than the best's so far by more than one standard error, and
not negligibly; after two steps in a row that are not, the ladder ends. If none counts, the frozen
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
import torch
from pydantic import BaseModel
from safetensors.torch import load, save

from core.adapters import Adapter
from core.datasets import Modality
from core.manifests import Slot
from core.preprocessing import FloatArray
from training.backbones import TorchBackbone
from training.fit import FOLDS, Head, IntArray, Judged, deal, fit_apart
from training.stopping import Stopped
from training.trainer import Epoch, Recipe, Trainer, read_metadata
from training.tuning import DeltaTask, Regularisation, Rows

LADDER_GROWTH = 2
FIRST_RUNG = 6
"""The first rung is so small a part of the blocks: one of MiniLM's six, two of sixteen."""

MISSES = 2
"""The ladder ends after so many rungs in a row that are not kept: one block may be too few."""

FEW_ROWS_PER_CLASS = 20
NEGLIGIBLE = 0.005
"""Nats a row that are not worth deltas: nearly equal models differ by a sure next to nothing."""

RESERVED_SHARE = 0.2
"""Of the job's time, for what comes after the search: features, export, publishing."""


class Step(BaseModel, frozen=True):
    """One rung of the ladder on the held-out rows: a line of the report.

    `gain` is the mean log-likelihood above the best before, in nats a row, `gain_error` its
    standard error. `blocks` 0 is the frozen head.
    """

    blocks: int
    epochs: int
    strength: float
    accuracy: float
    nll: float
    gain: float
    gain_error: float
    kept: bool
    seconds: float


@dataclass(frozen=True)
class Defaults:
    """What `auto` means for a modality."""

    rank: int
    learning_rate: float
    layer_decay: float
    batch_size: int
    epochs: int
    regularisation: Regularisation
    few_rows: Regularisation


DEFAULTS = {
    Modality.TEXT: Defaults(
        rank=8,
        learning_rate=1e-3,
        layer_decay=1.0,
        batch_size=32,
        epochs=10,
        regularisation=Regularisation(label_smoothing=0.1),
        few_rows=Regularisation(label_smoothing=0.1, contrast=1.0),
    ),
    Modality.IMAGE: Defaults(
        rank=16,
        learning_rate=5e-3,
        layer_decay=1.0,
        batch_size=32,
        epochs=10,
        regularisation=Regularisation(label_smoothing=0.1, mixup=0.2),
        few_rows=Regularisation(label_smoothing=0.1, mixup=0.2),
    ),
}


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
    `probabilities` and `targets` are of the rows `held_out`, by the best step.
    """

    steps: tuple[Step, ...]
    best: Step
    adapter: Adapter | None
    head: Head | None
    probabilities: FloatArray
    targets: IntArray
    held_out: IntArray


@dataclass(frozen=True)
class Plan:
    """What a job asks for; None is `auto`."""

    epochs: int | None
    batch_size: int | None
    learning_rate_multiplier: float
    patience: int


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


class _Progress(BaseModel):
    """What a state says beside the tensors."""

    steps: list[Step] = []
    training: int | None = None
    """Blocks of the step that is being trained."""

    trained_steps: int = 0
    """Training steps of the rungs that have ended."""

    saved_at: int = 0
    """Training steps until this state was saved."""


class Gradual:
    """One search; give it the state of an earlier attempt to go on from there."""

    def __init__(
        self, source: Source, plan: Plan, *, seed: int, deadline: float, watcher: Watcher,
        state: bytes | None = None,
    ) -> None:  # fmt: skip
        self._source = source
        self._defaults = DEFAULTS[source.backbone.modality]
        self._plan = plan
        self._seed = seed
        self._deadline = deadline
        self._watcher = watcher
        self._at = _Progress()
        self._judged: dict[int, FloatArray] = {}
        self._trainer_state: bytes | None = None
        if state is not None:
            self._restore(state)
        held_out = deal(source.targets, FOLDS, seed) == 0
        self._train, self._held_out = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self._rank = min(self._defaults.rank, *(min(s.in_dim, s.out_dim) for s in source.slots))

    @property
    def resumed_from(self) -> int:
        """How many training steps an earlier attempt had made."""
        return self._at.saved_at

    def run(self) -> Outcome:
        """Climb the ladder; raises `Stopped` when asked to, with its state saved."""
        truth = self._source.targets[self._held_out]
        frozen = self._judge(self._source.features)
        if not self._at.steps:
            self._keep(_step(0, 0, frozen, None, truth, 0.0), frozen)
        best = max((step for step in self._at.steps if step.kept), key=lambda step: step.blocks)
        for blocks in ladder(1 + max(slot.block for slot in self._source.slots)):
            if any(step.blocks >= blocks for step in self._at.steps):
                continue
            missed = self._at.steps[-MISSES:]
            if len(missed) == MISSES and not any(step.kept for step in missed):
                break
            if not self._affords(blocks):
                break
            rows = self._source.activations(self._cut(blocks))
            if rows is None:
                break
            step = self._climb(blocks, rows, best, frozen.head, truth)
            best = step if step.kept else best
        adapter, head = self._final(best, frozen.head) if best.blocks else (None, None)
        return Outcome(
            steps=tuple(self._at.steps),
            best=best,
            adapter=adapter,
            head=None if best.strength else head,
            probabilities=self._judged[best.blocks],
            targets=truth,
            held_out=self._held_out,
        )

    # -- rungs -------------------------------------------------------------------------------

    def _climb(self, blocks: int, rows: Rows, best: Step, head: Head, truth: IntArray) -> Step:
        began = time.monotonic()
        task = self._task(blocks, head, rows.subset(self._train), rows.subset(self._held_out))
        trainer = Trainer(
            task, self._recipe(self._epochs, patience=self._plan.patience), seed=self._seed
        )
        self._train_task(trainer, blocks)
        judged = self._better(task.head(), task.features(rows), truth)
        seconds = time.monotonic() - began
        losses = self._judged[best.blocks][np.arange(len(truth)), truth]
        step = _step(blocks, trainer.best_epoch, judged, losses, truth, seconds)
        self._at.trained_steps += trainer.step
        self._keep(step, judged)
        self._watcher.on_step(step, self._at.trained_steps, lambda: (task.adapter(), judged.head))
        return step

    def _final(self, best: Step, head: Head) -> tuple[Adapter, Head]:
        """Train the best rung's deltas and classifier on all rows."""
        rows = self._source.activations(self._cut(best.blocks))
        assert rows is not None  # as it was when the rung was climbed
        task = self._task(best.blocks, head, rows, None)
        trainer = Trainer(task, self._recipe(max(1, best.epochs), patience=None), seed=self._seed)
        self._train_task(trainer, -best.blocks)
        return task.adapter(), task.head()

    def _train_task(self, trainer: Trainer, blocks: int) -> None:
        """Run a trainer, keeping its state each epoch and when the job is told to stop."""
        if self._trainer_state is not None and self._at.training == blocks:
            trainer.restore(self._trainer_state)
        self._at.training, self._trainer_state = blocks, None

        def save_state() -> None:
            self._at.saved_at = self._at.trained_steps + trainer.step
            self._watcher.save(self._at.saved_at, self._state(trainer))

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
        self._at.training = None

    def _task(self, blocks: int, head: Head, train: Rows, held_out: Rows | None) -> DeltaTask:
        few = len(self._source.targets) < FEW_ROWS_PER_CLASS * self._source.classes
        return DeltaTask(
            self._source.backbone, self._source.slots, self._cut(blocks), self._rank, head,
            train, held_out,
            batch_size=self._plan.batch_size or self._defaults.batch_size,
            layer_decay=self._defaults.layer_decay,
            regularisation=self._defaults.few_rows if few else self._defaults.regularisation,
            seed=self._seed,
        )  # fmt: skip

    def _recipe(self, epochs: int, *, patience: int | None) -> Recipe:
        rate = self._defaults.learning_rate * self._plan.learning_rate_multiplier
        return Recipe(epochs=epochs, learning_rate=rate, patience=patience)

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
        rows = np.arange(len(truth))
        return max(
            (self._judge(features), along),
            key=lambda judged: float(np.log(judged.probabilities[rows, truth] + 1e-7).mean()),
        )

    def _affords(self, blocks: int) -> bool:
        """Tell whether a rung, and the final training if it is the best, will be done in time."""
        last = self._at.steps[-1]
        growth = blocks / last.blocks if last.blocks else 1.0
        return time.monotonic() + last.seconds * growth * 2.25 < self._deadline

    @property
    def _epochs(self) -> int:
        return self._plan.epochs or self._defaults.epochs

    def _cut(self, blocks: int) -> int:
        return 1 + max(slot.block for slot in self._source.slots) - blocks

    # -- state -------------------------------------------------------------------------------

    def _keep(self, step: Step, judged: Judged) -> None:
        self._at.steps.append(step)
        self._judged[step.blocks] = judged.probabilities

    def _state(self, trainer: Trainer) -> bytes:
        tensors = {f"judged/{b}": torch.from_numpy(p) for b, p in self._judged.items()}
        tensors["trainer"] = torch.frombuffer(bytearray(trainer.state()), dtype=torch.uint8)
        return save(tensors, {"gradual": self._at.model_dump_json()})

    def _restore(self, state: bytes) -> None:
        tensors = load(state)
        self._at = _Progress.model_validate_json(read_metadata(state)["gradual"])
        self._trainer_state = tensors.pop("trainer").numpy().tobytes()
        self._judged = {int(k.removeprefix("judged/")): t.numpy() for k, t in tensors.items()}


def ladder(blocks: int) -> list[int]:
    """Return how many blocks to unfreeze, step by step: for 6 blocks 1, 2, 4, 6."""
    rungs = [max(1, blocks // FIRST_RUNG)]
    while rungs[-1] * LADDER_GROWTH < blocks:
        rungs.append(rungs[-1] * LADDER_GROWTH)
    return rungs if rungs[-1] == blocks else [*rungs, blocks]


def _step(
    blocks: int, epochs: int, judged: Judged, before: FloatArray | None, truth: IntArray,
    seconds: float,
) -> Step:  # fmt: skip
    """Compare a rung with the best before it, whose probabilities of the truth are `before`."""
    chosen = np.maximum(judged.probabilities[np.arange(len(truth)), truth], 1e-7).astype(np.float64)
    gains = np.log(chosen) - (
        np.log(chosen) if before is None else np.log(np.maximum(before, 1e-7))
    )
    gain, error = float(gains.mean()), float(gains.std() / np.sqrt(len(truth)))
    return Step(
        blocks=blocks,
        epochs=epochs,
        strength=judged.strength,
        accuracy=float((judged.probabilities.argmax(axis=1) == truth).mean()),
        nll=float(-np.log(chosen).mean()),
        gain=gain,
        gain_error=error,
        kept=before is None or gain > max(error, NEGLIGIBLE),
        seconds=round(seconds, 2),
    )
