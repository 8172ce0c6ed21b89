"""`gradual`: unfreeze from the top, one step after another, for as long as it helps.

    frozen head ─▶ deltas on a quarter of the blocks, on more, each judged on held-out rows
                ─▶ the best number of blocks once more, on all rows

One row in three is held out, class by class, of many rows one in five, and of few each third in
turn (training.judgement). A step trains deltas and classifier on the others over activations cached
at its cut and keeps the epoch with the lowest loss on the held-out rows. It starts from a strongly
regularised head: one that is fitted to the end separates few rows perfectly and leaves no loss to
learn from. Its classifier is the one that was trained along, or one refitted on the features that
came out, as the held-out rows prefer; `strength` is 0 for the former. A step counts if it beats the
best so far (training.judgement); after two steps in a row that do not, the ladder ends. Where rows
per class are few, the first step is tried with a contrastive loss as well (training.tuning). If
none counts, the frozen head ships: on few rows any unfreezing may lose to it (docs/decisions).

The final deltas see all rows, for as many epochs as were best, so no row is left to judge them by:
the numbers quoted are those of the same step on the held-out rows.

Not here: one step's training (training.tuning, training.trainer), the features that are served.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from core.preprocessing import FloatArray
from training.fit import Head, IntArray, fit_at
from training.judgement import Judged, compare, fit_apart, likelihoods, split
from training.novelty import unseen_quantiles
from training.plan import Plan, Rung, next_rung
from training.search_state import Record, SearchState, Step, Trained
from training.stopping import Stopped, StopReason
from training.trainer import Epoch, Recipe, Trainer
from training.tuning import P, Part, Rows, Tuning

P_contra = TypeVar("P_contra", bound=Part, contravariant=True)

SLOWDOWN = 3
"""What the learning rate is divided by where training diverges."""

FINAL_COST = 1.25
"""What training on all rows costs, measured in trainings of one fold."""

RESERVED_SHARE = 0.2
"""Of the job's time, for what comes after the search: features, export, publishing."""


@dataclass(frozen=True)
class Source(Generic[P]):
    """What is trained: some of a backbone's `blocks`, on rows of these classes.

    `part(blocks)` is what there is to train of the top ones, untrained, and `rows(blocks)` what
    goes into it; None if that is too much to keep. `features` are the frozen ones. `serve` computes
    all rows' features as the trunk will; None if they are the same as torch's. Between two states
    that nobody asked for are at least `state_seconds`; if that is infinite, none is kept of a
    training that has not ended. `is_whole` says that there is one part only, and it is everything.
    """

    blocks: int
    targets: IntArray
    classes: int
    features: FloatArray
    part: Callable[[int], P]
    rows: Callable[[int], Rows | None]
    serve: Callable[[P], FloatArray] | None = None
    state_seconds: float = 0.0
    is_whole: bool = False


@dataclass(frozen=True)
class Outcome(Generic[P]):
    """The ladder's end: what is best on the held-out rows, and a part trained on all if it is any.

    `head` was trained along with them; None if it is to be refitted with the best step's strength.
    `probabilities` and `targets` are of the rows `held_out`, by number, by the best step, and
    `distances` the quantiles of how far they lie from the others (training.novelty).
    """

    steps: tuple[Step, ...]
    best: Step
    part: P | None
    head: Head | None
    probabilities: FloatArray
    targets: IntArray
    held_out: IntArray
    distances: FloatArray


class Watcher(Protocol[P_contra]):
    """Who is told how a search goes, and keeps its state."""

    def check(self) -> None:
        """Raise `Stopped` if the job is to stop."""

    def save(self, step: int, state: bytes) -> None:
        """Keep a state to resume from; `step` counts training steps."""

    def on_epoch(self, blocks: int, number: int, epoch: Epoch, step: int) -> None:
        """Hear of an epoch, after which the state of `step` was saved."""

    def on_slowdown(self, blocks: int, learning_rate: float) -> None:
        """Hear that a rung diverged and is tried again at this rate."""

    def on_stop(self, step: int) -> None:
        """Hear that training stops, and that the state of `step` was saved."""

    def on_step(self, step: Step, trained_steps: int, part: P_contra, head: Head) -> None:
        """Hear of a rung, with its part and classifier, of the training rows only."""


class Gradual(Generic[P]):
    """One search; give it the state of an earlier attempt to go on from there."""

    def __init__(
        self, source: Source[P], plan: Plan, *, seed: int, deadline: float, watcher: Watcher[P],
        state: bytes | None = None,
    ) -> None:  # fmt: skip
        self._source = source
        self._plan = plan
        self._seed = seed
        self._deadline = deadline
        self._watcher = watcher
        self._at = SearchState() if state is None else SearchState.from_bytes(state)
        self._kept_rows: tuple[int, Rows] | None = None
        self._folds = split(source.targets, seed)
        self._held_out = np.concatenate([fold.held_out for fold in self._folds])
        self._truth = source.targets[self._held_out]
        self._saved = time.monotonic()

    @property
    def resumed_from(self) -> int:
        """How many training steps an earlier attempt had made."""
        return self._at.saved_at

    def run(self) -> Outcome[P]:
        """Climb the ladder; raises `Stopped` when asked to, with its state saved."""
        if not self._at.steps:
            features = [self._source.features] * len(self._folds)
            self._end(Rung(0), 0, self._judge(features), features, 0.0)
        blocks = self._source.blocks
        ladder = [blocks] if self._source.is_whole else self._plan.ladder(blocks)
        while rung := next_rung(self._at.steps, ladder, self._plan.contrast):
            if not self._affords(rung):
                break
            rows = self._rows(rung.blocks)
            if rows is None:
                break
            self._climb(rung, rows)
        best, record = self._at.steps[self._at.best], self._at.records[self._at.best]
        part, head = self._final(best) if best.blocks else (None, None)
        rising = np.argsort(self._held_out)
        return Outcome(
            steps=tuple(self._at.steps),
            best=best,
            part=part,
            head=None if best.strength else head,
            probabilities=record.probabilities[rising],
            targets=self._truth[rising],
            held_out=self._held_out[rising],
            distances=record.distances,
        )

    # -- rungs -------------------------------------------------------------------------------

    def _climb(self, rung: Rung, rows: Rows) -> None:
        """Train a rung on each fold that an earlier attempt has not, and judge it.

        Nothing is judged if training diverges: the rung comes again at a lower rate.
        """
        began = time.monotonic()
        for number in range(len(self._at.folds), len(self._folds)):
            tuned = self._train_fold(rung, rows, number)
            if tuned is None:
                self._slow_down(rung)
                return
            task = tuned
            if number + 1 < len(self._folds):
                self._save()
        trained = self._at.folds
        epochs = round(sum(each.epochs for each in trained) / len(trained))
        judged = self._better(task.head(), trained)
        seconds = time.monotonic() - began
        step = self._end(rung, epochs, judged, [each.features for each in trained], seconds)
        self._watcher.on_step(step, self._at.trained_steps, task.part, judged.head)
        self._save()

    def _train_fold(self, rung: Rung, rows: Rows, number: int) -> Tuning[P] | None:
        """Train on one fold's rows, and note how its held-out rows do; None if that diverges."""
        fold = self._folds[number]
        task = self._task(rung, rows.subset(fold.train), rows.subset(fold.held_out), fold.train)
        recipe = Recipe(
            epochs=self._plan.epochs,
            learning_rate=self._learning_rate,
            patience=self._plan.patience,
            rows_at_once=task.part.rows_at_once,
        )
        trainer = Trainer(task, recipe, seed=self._seed)
        trainings = len(self._folds) - number + FINAL_COST
        self._train(trainer, rung, f"{len(self._at.steps)}/{number}", trainings)
        if trainer.diverged and self._at.slowdowns < self._plan.slowdowns:
            return None
        features = self._features(task, rows)
        along = task.head().predict(features[fold.held_out])
        self._at.folds.append(Trained(trainer.best_epoch, features, along))
        return task

    def _slow_down(self, rung: Rung) -> None:
        self._at.slowdowns += 1
        self._at.folds = []
        self._watcher.on_slowdown(rung.blocks, self._learning_rate)

    def _final(self, best: Step) -> tuple[P, Head]:
        """Train the best rung's part and classifier on all rows."""
        rows = self._rows(best.blocks)
        assert rows is not None  # as it was when the rung was climbed
        rung = Rung(best.blocks, best.contrast)
        task = self._task(rung, rows, None, np.arange(len(rows)))
        recipe = Recipe(
            epochs=max(1, best.epochs),
            learning_rate=best.learning_rate,
            rows_at_once=task.part.rows_at_once,
        )
        trainer = Trainer(task, recipe, seed=self._seed)
        self._train(trainer, rung, "final", 1)
        return task.part, task.head()

    def _train(self, trainer: Trainer, rung: Rung, name: str, trainings: float) -> None:
        """Run a trainer, keeping its state now and then and when the job is told to stop.

        It has as much of the time that is left as each of the `trainings` that are to come.
        """
        if self._at.trainer is not None and self._at.training == name:
            trainer.restore(self._at.trainer)
        self._at.training, self._at.trainer = name, None
        began = time.monotonic()
        deadline = began + (self._deadline - began) / trainings

        def on_epoch(epoch: Epoch) -> bool:
            if time.monotonic() - self._saved >= self._source.state_seconds:
                self._save(trainer)
            self._watcher.on_epoch(rung.blocks, len(trainer.history), epoch, self._at.saved_at)
            return time.monotonic() < deadline

        try:
            trainer.run(check=self._watcher.check, on_epoch=on_epoch)
        except Stopped as stopped:
            if self._source.state_seconds < math.inf and stopped.reason is not StopReason.CANCEL:
                self._save(trainer)
            self._watcher.on_stop(self._at.saved_at)
            raise
        self._at.training = self._at.trainer = None
        self._at.trained_steps += trainer.step

    def _save(self, trainer: Trainer | None = None) -> None:
        """Keep a state; without a `trainer` it is one between two trainings."""
        self._at.saved_at = self._at.trained_steps + (trainer.step if trainer else 0)
        self._at.trainer = trainer.state() if trainer else None
        self._watcher.save(self._at.saved_at, self._at.to_bytes())
        self._at.trainer = None
        self._saved = time.monotonic()

    def _task(self, rung: Rung, train: Rows, held_out: Rows | None, numbers: IntArray) -> Tuning[P]:
        """Return the training of a rung on the rows of these `numbers`, from their frozen head."""
        head = fit_at(
            self._source.features[numbers], self._source.targets[numbers], self._source.classes,
            self._plan.start_strength,
        )  # fmt: skip
        return Tuning(
            self._source.part(rung.blocks), head, train, held_out,
            batch_size=self._plan.batch_size,
            regularisation=self._plan.regularisation.model_copy(update={"contrast": rung.contrast}),
        )  # fmt: skip

    @property
    def _learning_rate(self) -> float:
        return self._plan.learning_rate / float(SLOWDOWN**self._at.slowdowns)

    def _features(self, task: Tuning[P], rows: Rows) -> FloatArray:
        """Return all rows' features as they will be served."""
        if self._source.serve is None:
            return task.features(rows)
        return self._source.serve(task.part)

    def _judge(self, features: Sequence[FloatArray]) -> Judged:
        return fit_apart(features, self._source.targets, self._folds, self._source.classes)

    def _better(self, head: Head, trained: Sequence[Trained]) -> Judged:
        """Return the classifiers that suit the held-out rows better: trained along, or refitted.

        Trained features set the training rows so far apart that a refit may be too sure of itself.
        `head` is the one of the last fold that was trained along.
        """
        along = Judged(head, 0.0, np.concatenate([each.along for each in trained]))
        return max(
            (self._judge([each.features for each in trained]), along),
            key=lambda judged: float(likelihoods(judged.probabilities, self._truth).mean()),
        )

    def _end(
        self, rung: Rung, epochs: int, judged: Judged, features: Sequence[FloatArray],
        seconds: float,
    ) -> Step:  # fmt: skip
        """Compare a rung with the best before it."""
        after = likelihoods(judged.probabilities, self._truth)
        first = not self._at.steps
        before = after if first else self._likelihoods_of(self._at.best)
        gain = compare(after, before)
        step = Step(
            blocks=rung.blocks,
            contrast=rung.contrast,
            learning_rate=self._learning_rate,
            epochs=epochs,
            strength=judged.strength,
            accuracy=float((judged.probabilities.argmax(axis=1) == self._truth).mean()),
            nll=-float(after.mean()),
            gain=gain.mean,
            gain_error=gain.error,
            kept=first or gain.counts,
            seconds=round(seconds, 2),
            is_whole=self._source.is_whole and not first,
        )
        targets, classes = self._source.targets, self._source.classes
        distances = [
            unseen_quantiles(each[fold.train], targets[fold.train], each[fold.held_out], classes)
            for each, fold in zip(features, self._folds, strict=True)
        ]
        self._at.add(step, Record(judged.probabilities, np.mean(distances, axis=0)))
        return step

    def _likelihoods_of(self, number: int) -> npt.NDArray[np.float64]:
        return likelihoods(self._at.records[number].probabilities, self._truth)

    def _rows(self, blocks: int) -> Rows | None:
        """Return what enters the top blocks; the last is kept, for it may be trained on again."""
        if self._kept_rows is None or self._kept_rows[0] != blocks:
            self._kept_rows = None  # two at once may not fit
            rows = self._source.rows(blocks)
            self._kept_rows = None if rows is None else (blocks, rows)
        return None if self._kept_rows is None else self._kept_rows[1]

    def _affords(self, rung: Rung) -> bool:
        """Tell whether a rung, and the final training if it is the best, will be done in time."""
        last = self._at.steps[-1]
        growth = rung.blocks / last.blocks if last.blocks else 1.0
        needed = last.seconds * growth * (1 + FINAL_COST / len(self._folds))
        return time.monotonic() + needed < self._deadline
