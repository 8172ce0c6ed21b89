"""`gradual`: unfreeze from the top, one step after another, for as long as it helps.

    frozen head ─▶ deltas on a quarter of the blocks, on more, each judged on held-out rows
                ─▶ the best number of blocks once more, on all rows

One row in three is held out, class by class, of many rows one in five, and of few each third in
turn (training.judgement). A step trains deltas and classifier on the others over activations cached
at its cut and keeps the epoch with the lowest loss on the held-out rows. It starts from a strongly
regularised head: one that is fitted to the end separates few rows perfectly and leaves no loss to
learn from. What comes out are all of the deltas or half of them (training.tuning), with a
classifier refitted on their features or the one that was trained along, as the held-out rows
prefer; `strength` is 0 for the latter. A step counts if it beats the best so far; after two steps
in a row that do not, the ladder ends. Where rows per class are few, the first step is tried with a
contrastive loss as well. If none counts, the frozen head ships: on few rows any unfreezing may lose
to it (docs/decisions/0012).

The final deltas see all rows, for as many epochs as were best, so no row is left to judge them by:
the numbers quoted are those of the same step on the held-out rows.

Not here: one step's training (training.tuning, training.trainer), the features that are served.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Generic

import numpy as np

from core.errors import NoSpace
from core.preprocessing import FloatArray
from training.fit import Head
from training.judgement import Judged, Jury, compare
from training.objectives import DoubleArray
from training.outcome import Outcome, Watcher
from training.plan import Plan, Rung, next_rung
from training.rungs import SHARES, Source, Tasks
from training.search_state import Ending, Ladder, Record, SearchState, Step, Trained
from training.stopping import Stopped, StopReason
from training.trainer import Epoch, Recipe, Trainer
from training.tuning import P, Rows, Tuning

SLOWDOWN = 3
"""What the learning rate is divided by where training diverges."""

FINAL_COST = 1.25
"""What training on all rows costs, measured in trainings of one fold."""

RESERVED_SHARE = 0.2
"""Of the job's time, for what comes after the search: features, export, publishing."""


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
        self._tasks = Tasks(source, plan)
        self._saved = time.monotonic()
        # What an earlier attempt left undone for want of time is not known.
        self._is_hurried = state is not None
        self._jury = Jury(source.objective, seed, source.twins)

    @property
    def resumed_from(self) -> int:
        """How many training steps an earlier attempt had made."""
        return self._at.saved_at

    def run(self) -> Outcome[P]:
        """Climb the ladder; raises `Stopped` when asked to, with its state saved."""
        if not self._at.steps:
            features = [self._source.features] * len(self._jury.folds)
            self._end(Rung(0), 0, self._jury.judge(features), features, 0.0)
        while self._at.ending is None:
            found = self._next()
            if isinstance(found, Ending):
                self._at.ending = found
                self._is_hurried |= found.reason in ("time", "space")
                self._watcher.on_end(found)
            else:
                self._climb(*found)
        best, record = self._at.steps[self._at.best], self._at.records[self._at.best]
        part, head = self._final(best) if best.blocks else (None, None)
        rising = np.argsort(self._jury.rows)
        return Outcome(
            ladder=Ladder(tuple(self._at.steps), self._at.ending),
            best=best,
            part=part,
            head=None if best.strength else head,
            outputs=record.outputs[rising],
            targets=self._jury.truth[rising],
            held_out=self._jury.rows[rising],
            distances=record.distances,
            is_hurried=self._is_hurried,
        )

    # -- rungs -------------------------------------------------------------------------------

    def _next(self) -> tuple[Rung, Rows] | Ending:
        """Return the next rung and what goes into it, or why there is none."""
        rung = next_rung(self._at.steps, self._tasks.ladder, self._plan.contrast)
        if isinstance(rung, Ending):
            return rung
        try:
            return self._too_late(rung) or (rung, self._tasks.rows(rung.blocks))
        except NoSpace as error:
            return Ending(reason="space", why=str(error))

    def _climb(self, rung: Rung, rows: Rows) -> None:
        """Train a rung on each fold that an earlier attempt has not, and judge it.

        Nothing is judged if training diverges: the rung comes again at a lower rate.
        """
        began = time.monotonic()
        while len(self._at.folds) < len(self._jury.folds):
            tuned = self._train_fold(rung, rows)
            if tuned is None:
                self._slow_down(rung)
                return
            task = tuned
            if len(self._at.folds) < len(self._jury.folds):
                self._save()
        trained = self._at.folds
        epochs = round(sum(each.epochs for each in trained) / len(trained))
        judged = self._jury.choose(self._candidates(task.head(), trained))
        task.part.set_share(judged.share)
        chosen = [each.features[SHARES.index(judged.share)] for each in trained]
        step = self._end(rung, epochs, judged, chosen, time.monotonic() - began)
        self._watcher.on_step(step, self._at.trained_steps, task.part, judged.head)
        self._save()

    def _train_fold(self, rung: Rung, rows: Rows) -> Tuning[P] | None:
        """Train on the next fold's rows, and note how all rows do; None if that diverges."""
        number = len(self._at.folds)
        fold = self._jury.folds[number]
        task = self._tasks.make(rung, rows, fold.train, fold.held_out)
        recipe = Recipe(
            epochs=self._plan.epochs,
            learning_rate=self._learning_rate,
            patience=self._plan.patience,
            rows_at_once=task.part.rows_at_once,
        )
        trainer = Trainer(task, recipe, seed=self._seed)
        trainings = len(self._jury.folds) - number + FINAL_COST
        self._train(trainer, rung, f"{len(self._at.steps)}/{number}", trainings)
        if trainer.diverged and self._at.slowdowns < self._plan.slowdowns:
            return None
        features = self._tasks.features(task, rows)
        along = task.head().predict(features[SHARES.index(1.0), fold.held_out])
        self._at.folds.append(Trained(trainer.best_epoch, features, along))
        return task

    def _slow_down(self, rung: Rung) -> None:
        self._at.slowdowns += 1
        self._at.folds = []
        self._watcher.on_slowdown(rung.blocks, self._learning_rate)

    def _final(self, best: Step) -> tuple[P, Head]:
        """Train the best rung's part and classifier on all rows."""
        rows = self._tasks.rows(best.blocks)
        rung = Rung(best.blocks, best.contrast)
        task = self._tasks.make(rung, rows, np.arange(len(rows)))
        recipe = Recipe(
            epochs=max(1, best.epochs),
            learning_rate=best.learning_rate,
            rows_at_once=task.part.rows_at_once,
        )
        trainer = Trainer(task, recipe, seed=self._seed)
        self._train(trainer, rung, "final", 1)
        task.part.set_share(best.share)
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
        pause = self._source.state_seconds

        def on_epoch(epoch: Epoch) -> bool:
            if time.monotonic() - self._saved >= pause:
                self._save(trainer)
            self._watcher.on_epoch(rung.blocks, len(trainer.history), epoch, self._at.saved_at)
            is_late = time.monotonic() >= deadline
            self._is_hurried |= is_late
            return not is_late

        try:
            trainer.run(check=self._watcher.check, on_epoch=on_epoch)
        except Stopped as stopped:
            if pause < math.inf and stopped.reason is not StopReason.CANCEL:
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

    @property
    def _learning_rate(self) -> float:
        return self._plan.learning_rate / float(SLOWDOWN**self._at.slowdowns)

    def _candidates(self, head: Head, trained: Sequence[Trained]) -> list[Judged]:
        """Return what a rung may come to, the safest first.

        Heads are refitted for each share, half of the deltas before all of them. Last comes the one
        that was trained along, of which `head` is the last fold's: trained features set the
        training rows so far apart that a refit may be too sure of itself.
        """
        refitted = [
            self._jury.judge([each.features[number] for each in trained], share)
            for number, share in enumerate(SHARES)
        ]
        along = np.concatenate([each.along for each in trained])
        return [*refitted, Judged(head, 0.0, along)]

    def _end(
        self, rung: Rung, epochs: int, judged: Judged, features: Sequence[FloatArray],
        seconds: float,
    ) -> Step:  # fmt: skip
        """Compare a rung with the best before it."""
        after = self._jury.likelihoods(judged.outputs)
        first = not self._at.steps
        before = after if first else self._likelihoods_of(self._at.best)
        gain = compare(after, before)
        step = Step(
            blocks=rung.blocks,
            contrast=rung.contrast,
            share=judged.share,
            learning_rate=self._learning_rate,
            epochs=epochs,
            strength=judged.strength,
            **self._jury.score(judged)._asdict(),
            nll=-float(after.mean()),
            gain=gain.mean,
            gain_error=gain.error,
            kept=first or gain.counts,
            seconds=round(seconds, 2),
            is_whole=self._source.is_whole and not first,
        )
        self._at.add(step, Record(judged.outputs, self._jury.distances(features)))
        return step

    def _likelihoods_of(self, number: int) -> DoubleArray:
        return self._jury.likelihoods(self._at.records[number].outputs)

    def _too_late(self, rung: Rung) -> Ending | None:
        """Tell if a rung, and the final training if it is the best, will not be done in time."""
        last = self._at.steps[-1]
        growth = rung.blocks / last.blocks if last.blocks else 1.0
        needed = last.seconds * growth * (1 + FINAL_COST / len(self._jury.folds))
        left = max(0.0, self._deadline - time.monotonic())
        if needed < left:
            return None
        return Ending(
            reason="time",
            why=f"the next step and a last training would take about {needed:.0f} s, and "
            f"{left:.0f} s are left",
        )
