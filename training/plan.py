"""What a search tries, and how it trains: as the job asks, and what `auto` means where it does not.

The defaults were chosen on varied data, not found anew by each job: docs/decisions/0012 has what
they come from. Not here: the search that follows a plan (training.gradual).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.datasets import Modality
from core.jobs import EarlyStopping, Hyperparameters
from training.fit import IntArray
from training.search_state import Ending, Step
from training.strength import STRENGTHS
from training.tuning import Regularisation

LADDER_GROWTH = 3
FIRST_RUNG = 0.25
"""The first rung's part of the blocks: two of MiniLM's six, four of EfficientNet-Lite0's 17."""

MISSES = 2
"""The ladder ends after so many rungs in a row that are not kept: one block may be too few."""

FEW_ROWS = 400
FEW_ROWS_BATCH, BATCH = 16, 32
FEW_ROWS_PER_CLASS = 16
"""Of the median class: so far the contrastive loss is tried."""

SLOWDOWNS = 2
"""How often a search lowers a rate that training diverges at."""

FEWEST_EPOCHS, MOST_EPOCHS = 3, 30


@dataclass(frozen=True)
class Rung:
    """Something to try: deltas on the top `blocks`, with a `contrast` of this weight."""

    blocks: int
    contrast: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How every rung of a search is trained.

    `learning_rate` is the highest of the schedule; where training diverges it is lowered, at most
    `slowdowns` times, unless the job asked for it. `contrast` is the weight of the contrastive loss
    in the rungs that try it; if it is 0, none does.
    """

    rank: int
    learning_rate: float
    slowdowns: int
    start_strength: float
    epochs: int
    batch_size: int
    patience: int
    regularisation: Regularisation
    contrast: float
    deepest: float

    def ladder(self, blocks: int) -> list[int]:
        """Return how many of the blocks to unfreeze, step by step."""
        return ladder(blocks, self.deepest)


@dataclass(frozen=True)
class Defaults:
    """What `auto` means for a modality.

    `start_strength` is the L2, one of `STRENGTHS`, of the classifier that training starts from.
    Training takes about `steps` steps, however many rows there are. The ladder ends at the part
    `deepest` of the blocks: lower ones of an image take most of the time for the least gain.
    """

    rank: int
    learning_rate: float
    start_strength: float
    steps: int
    regularisation: Regularisation
    contrast: float = 1.0
    deepest: float = 1.0

    def plan(self, groups: IntArray, chosen: Hyperparameters, stopping: EarlyStopping) -> Plan:
        """Return the plan for rows of these classes, or groups of another kind, [n]."""
        rows, multiplier = len(groups), chosen.learning_rate_multiplier
        per_class = float(np.median(np.unique(groups, return_counts=True)[1]))
        batch_size = FEW_ROWS_BATCH if rows < FEW_ROWS else BATCH
        epochs = round(self.steps / math.ceil(rows / batch_size))
        return Plan(
            rank=self.rank,
            learning_rate=self.learning_rate * (1.0 if multiplier == "auto" else multiplier),
            slowdowns=SLOWDOWNS if multiplier == "auto" else 0,
            start_strength=self.start_strength,
            epochs=min(max(epochs, FEWEST_EPOCHS), MOST_EPOCHS)
            if chosen.n_epochs == "auto"
            else chosen.n_epochs,
            batch_size=batch_size if chosen.batch_size == "auto" else chosen.batch_size,
            patience=stopping.patience,
            regularisation=self.regularisation,
            contrast=self.contrast if per_class <= FEW_ROWS_PER_CLASS else 0.0,
            deepest=self.deepest,
        )


DEFAULTS = {
    Modality.TEXT: Defaults(
        rank=8,
        learning_rate=3e-3,
        start_strength=STRENGTHS[6],
        steps=160,
        regularisation=Regularisation(label_smoothing=0.1),
    ),
    Modality.IMAGE: Defaults(
        rank=16,
        learning_rate=5e-3,
        start_strength=STRENGTHS[4],
        steps=190,
        deepest=0.25,
        regularisation=Regularisation(label_smoothing=0.1, mixup=0.2),
    ),
}


def ladder(blocks: int, deepest: float = 1.0) -> list[int]:
    """Return how many blocks to unfreeze, step by step: for 6 blocks 2 and 6.

    Not more than the part `deepest` of them, unless that is less than the first rung.
    """
    rungs = [max(1, round(FIRST_RUNG * blocks))]
    while rungs[-1] < blocks:
        rungs.append(min(rungs[-1] * LADDER_GROWTH, blocks))
    return [rungs[0], *(rung for rung in rungs[1:] if rung <= deepest * blocks)]


def next_rung(steps: Sequence[Step], ladder: Sequence[int], contrast: float) -> Rung | Ending:
    """Return what to try after these steps, of which the first is the frozen head.

    The top blocks alone, the same with `contrast` if it is not 0, then deeper with whichever of
    the two was better.
    """
    if len(steps) == 1:
        return Rung(ladder[0])
    if contrast and not any(step.contrast for step in steps):
        return Rung(ladder[0], contrast)
    if not any(step.kept for step in steps[-MISSES:]):
        return Ending(reason="misses", why=f"{MISSES} steps in a row were not kept")
    best = next(step for step in reversed(steps) if step.kept)
    deeper = [blocks for blocks in ladder if blocks > steps[-1].blocks]
    if not deeper:
        return Ending(reason="top", why="there is nothing more to unfreeze")
    return Rung(deeper[0], best.contrast)
