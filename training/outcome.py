"""What a search tells: its news while it goes on, and what it has come to in the end.

Not here: the search (training.gradual), what a job makes of its news (training.search).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from core.preprocessing import FloatArray
from training.data import Targets
from training.fit import Head, IntArray
from training.search_state import Ending, Ladder, Step
from training.trainer import Epoch
from training.tuning import P, Part

P_contra = TypeVar("P_contra", bound=Part, contravariant=True)


@dataclass(frozen=True)
class Outcome(Generic[P]):
    """The ladder's end: what is best on the held-out rows, and a part trained on all if it is any.

    `head` was trained along with them; None if it is to be refitted with the best step's strength.
    `outputs` and `targets` are of the rows `held_out`, by number, by the best step, and
    `distances` the quantiles of how far they lie from the others (training.novelty). Another search
    for the same may come to something else if the machine had a part in it (`is_hurried`): it was
    out of time, or of room.
    """

    ladder: Ladder
    best: Step
    part: P | None
    head: Head | None
    outputs: FloatArray
    targets: Targets
    held_out: IntArray
    distances: FloatArray
    is_hurried: bool


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

    def on_end(self, ending: Ending) -> None:
        """Hear why the ladder ended."""

    def on_stop(self, step: int) -> None:
        """Hear that training stops, and that the state of `step` was saved."""

    def on_step(self, step: Step, trained_steps: int, part: P_contra, head: Head) -> None:
        """Hear of a rung, with its part and classifier, of the training rows only."""
