"""What a search knows so far, and its way into bytes and back: what a paused job goes on from.

Steps and numbers are JSON, arrays are tensors beside it, in one safetensors file with the state of
the trainer (training.trainer) that was at work. Not here: the search (training.gradual), where
states are kept (core.checkpoints).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pydantic import BaseModel
from safetensors.torch import load, save

from core.preprocessing import FloatArray
from training.fit import IntArray
from training.judgement import Judged, compare, likelihoods
from training.trainer import read_metadata


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


class _Progress(BaseModel):
    """The numbers of a state."""

    steps: list[Step] = []
    training: int | None = None
    trained_steps: int = 0
    saved_at: int = 0


@dataclass
class SearchState:
    """What a search has found out.

    `judged` has for each step the held-out rows' probabilities, and `distances` how far from the
    others they lie (training.novelty), both by blocks. `training` says which training
    `trainer` is the state of. `trained_steps` counts training steps of trainings that have ended,
    `saved_at` all until the state was saved.
    """

    steps: list[Step] = field(default_factory=list)
    judged: dict[int, FloatArray] = field(default_factory=dict)
    distances: dict[int, FloatArray] = field(default_factory=dict)
    training: int | None = None
    trainer: bytes | None = None
    trained_steps: int = 0
    saved_at: int = 0

    @property
    def best(self) -> Step:
        """The last step that was kept."""
        return [step for step in self.steps if step.kept][-1]

    def to_bytes(self) -> bytes:
        """Return it as one safetensors file."""
        tensors = {f"judged/{b}": torch.from_numpy(p) for b, p in self.judged.items()}
        tensors |= {f"distances/{b}": torch.from_numpy(d) for b, d in self.distances.items()}
        tensors["trainer"] = torch.frombuffer(bytearray(self.trainer or b""), dtype=torch.uint8)
        progress = _Progress(
            steps=self.steps,
            training=self.training,
            trained_steps=self.trained_steps,
            saved_at=self.saved_at,
        )
        return save(tensors, {"gradual": progress.model_dump_json()})

    @classmethod
    def from_bytes(cls, data: bytes) -> SearchState:
        """Return what `to_bytes` wrote; raises `KeyError`, `ValueError` or `SafetensorError`."""
        tensors = load(data)
        progress = _Progress.model_validate_json(read_metadata(data)["gradual"])
        state = cls(**dict(progress), trainer=tensors.pop("trainer").numpy().tobytes())
        for name, tensor in tensors.items():
            kind, blocks = name.split("/")
            kept = {"judged": state.judged, "distances": state.distances}[kind]
            kept[int(blocks)] = tensor.numpy()
        return state


def make_step(
    blocks: int, epochs: int, judged: Judged, before: FloatArray | None, truth: IntArray,
    seconds: float,
) -> Step:  # fmt: skip
    """Compare a rung with the best before it, whose probabilities are `before`."""
    after = likelihoods(judged.probabilities, truth)
    gain = compare(after, None if before is None else likelihoods(before, truth))
    return Step(
        blocks=blocks,
        epochs=epochs,
        strength=judged.strength,
        accuracy=float((judged.probabilities.argmax(axis=1) == truth).mean()),
        nll=-float(after.mean()),
        gain=gain.mean,
        gain_error=gain.error,
        kept=before is None or gain.counts,
        seconds=round(seconds, 2),
    )
