"""What a search knows so far, and its way into bytes and back: what a paused job goes on from.

Numbers are JSON and arrays are tensors, in one safetensors file with the state of the trainer that
was at work (training.trainer). Not here: the search (training.gradual), where states are kept
(core.checkpoints).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import load, save
from torch import Tensor

from core.manifests import Interval
from core.preprocessing import FloatArray
from training.trainer import TrainerState

_TRAINER = "trainer/"
"""What the names of the trainer's tensors begin with."""


class Step(BaseModel, frozen=True):
    """One rung of the ladder on the held-out rows: a line of the report.

    `gain` is the mean log-likelihood above the best before, in nats a row, `gain_error` its
    standard error. `blocks` 0 is the frozen head; `contrast` is the weight of the contrastive loss,
    `share` the part of what was trained that was best (training.tuning), and `strength` that of the
    head on its features, 0 for the classifier that was trained along. `is_whole` says that all
    parameters were trained, not deltas. `accuracy` is that of a report, None for values, which have
    an `rmse` and an `interval` instead. With a remedy for imbalance each class has the same weight
    in `nll` and `gain`.
    """

    blocks: int
    epochs: int
    strength: float
    accuracy: float | None = None
    rmse: float | None = None
    interval: Interval | None = None
    nll: float
    gain: float
    gain_error: float
    kept: bool
    seconds: float
    learning_rate: float
    contrast: float
    share: float
    is_whole: bool = False

    @property
    def name(self) -> str:
        """What was tried, for people."""
        if self.is_whole:
            return "Everything" + (f", {100 * self.share:.0f} % of it" if self.share < 1 else "")
        contrast = ", contrastive" if self.contrast else ""
        share = f", {100 * self.share:.0f} % of the deltas" if self.share < 1 else ""
        return f"Top {self.blocks} blocks{contrast}{share}"

    @property
    def score(self) -> str:
        """How right its answers are, for people."""
        if self.accuracy is None:
            return f"root mean squared error {self.rmse:.4g}"
        return f"accuracy {self.accuracy:.3f}"

    def metrics(self) -> dict[str, float]:
        """Return the figures of a manifest."""
        figures = {"accuracy": self.accuracy, "rmse": self.rmse, "nll": self.nll}
        return {name: value for name, value in figures.items() if value is not None}


class Ending(BaseModel, frozen=True):
    """Why no further step is tried, and in words: a line of the report.

    `top`: there is nothing more to unfreeze. `misses`: several steps in a row were not kept.
    `time`: the next would not be done in the job's. `space`: its activations are too large.
    """

    reason: Literal["top", "misses", "time", "space"]
    why: str


@dataclass(frozen=True)
class Ladder:
    """The steps that were tried, the first being the frozen head, and why there are no more.

    Without a search there are none, and no `ending`.
    """

    steps: tuple[Step, ...] = ()
    ending: Ending | None = None

    @property
    def why_frozen(self) -> str:
        """Why the frozen head ships, if it does."""
        if len(self.steps) < 2 and self.ending is not None:
            return f"No step was tried: {self.ending.why}"
        return "No step beat the frozen head by more than one standard error"


@dataclass(frozen=True)
class Record:
    """How a step did: the held-out rows' `outputs` [m, width], fold by fold.

    `distances` are quantiles of how far these rows lie from the others (training.novelty).
    """

    outputs: FloatArray
    distances: FloatArray


@dataclass(frozen=True)
class Trained:
    """A fold's training that has ended, at its best after `epochs`.

    `features` [shares, n, dim] are of all rows, with each of the shares of the deltas that are
    judged; `along` [m, width] are the outputs for the fold's held-out rows of the classifier that
    was trained along.
    """

    epochs: int
    features: FloatArray
    along: FloatArray


class _Numbers(BaseModel):
    """What of a state is no array."""

    steps: list[Step] = []
    epochs: list[int] = []
    training: str | None = None
    ending: Ending | None = None
    slowdowns: int = 0
    trained_steps: int = 0
    saved_at: int = 0


class SearchState:
    """What a search has found out, step by step, and of the step that it is at, fold by fold.

    `training` names the training that `trainer` is the state of. With an `ending` the last training
    has come. `slowdowns` says how often the learning rate was lowered. `trained_steps` counts the
    training steps of trainings that have ended, `saved_at` all until the state was saved.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.records: list[Record] = []
        self.folds: list[Trained] = []
        self.training: str | None = None
        self.trainer: TrainerState | None = None
        self.ending: Ending | None = None
        self.slowdowns = 0
        self.trained_steps = 0
        self.saved_at = 0

    @property
    def best(self) -> int:
        """The number of the last step that was kept."""
        return max(number for number, step in enumerate(self.steps) if step.kept)

    def add(self, step: Step, record: Record) -> None:
        """End the step that the search is at."""
        self.steps.append(step)
        self.records.append(record)
        self.folds = []

    def to_bytes(self) -> bytes:
        """Return it as one safetensors file."""
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        if self.trainer is not None:
            tensors |= {f"{_TRAINER}{key}": each for key, each in self.trainer.tensors.items()}
            metadata = {"trainer": self.trainer.position}
        for number, record in enumerate(self.records):
            tensors[f"outputs/{number}"] = torch.from_numpy(record.outputs)
            tensors[f"distances/{number}"] = torch.from_numpy(record.distances)
        for number, fold in enumerate(self.folds):
            tensors[f"features/{number}"] = torch.from_numpy(fold.features)
            tensors[f"along/{number}"] = torch.from_numpy(fold.along)
        numbers = _Numbers(
            steps=self.steps,
            epochs=[fold.epochs for fold in self.folds],
            training=self.training,
            ending=self.ending,
            slowdowns=self.slowdowns,
            trained_steps=self.trained_steps,
            saved_at=self.saved_at,
        )
        return save(tensors, metadata | {"gradual": numbers.model_dump_json()})

    @classmethod
    def from_bytes(cls, data: bytes) -> SearchState:
        """Return what `to_bytes` wrote; raises `KeyError`, `ValueError` or `SafetensorError`."""
        tensors = load(data)
        metadata = _read_metadata(data)
        numbers = _Numbers.model_validate_json(metadata["gradual"])
        state = cls()
        state.steps, state.training = numbers.steps, numbers.training
        state.ending, state.slowdowns = numbers.ending, numbers.slowdowns
        state.trained_steps, state.saved_at = numbers.trained_steps, numbers.saved_at
        if "trainer" in metadata:
            own = [name for name in tensors if name.startswith(_TRAINER)]
            state.trainer = TrainerState(
                {name.removeprefix(_TRAINER): tensors[name] for name in own}, metadata["trainer"]
            )
        state.records = [
            Record(_array(tensors, "outputs", n), _array(tensors, "distances", n))
            for n in range(len(numbers.steps))
        ]
        state.folds = [
            Trained(epochs, _array(tensors, "features", n), _array(tensors, "along", n))
            for n, epochs in enumerate(numbers.epochs)
        ]
        return state


def _read_metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of safetensors bytes, which the library reads from files only."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return metadata


def _array(tensors: dict[str, Tensor], kind: str, number: int) -> FloatArray:
    return np.asarray(tensors[f"{kind}/{number}"].numpy(), np.float32)
