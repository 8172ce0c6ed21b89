"""The training loop: AdamW over a task's parameters, validated each epoch, resumable to the bit.

    for each epoch: for each batch: check ─▶ loss ─▶ clip ─▶ step;  then validate ─▶ keep the best

The rate rises linearly over the first steps and then falls to zero. Where training is, is a handful
of tensors and numbers: `state` returns them, `restore` goes on from there, and ends with the same
bits as if it had never stopped. For that, nothing random is carried along: the order of an epoch's
rows is drawn from (seed, epoch), and whatever a step draws, from (seed, step).

Training ends at once when a loss is no number. Not here: what is trained and on what
(training.gradual), where states are kept (core.checkpoints).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor

DIVERGED = 1.25
"""The last epoch's training loss above this many times the first's: the rate was too high."""


class Recipe(BaseModel, frozen=True):
    """How to train. `warmup` is the part of all steps in which the rate rises.

    Training ends after `patience` epochs without a lower validation loss; None means never. Of a
    batch at most `rows_at_once` are computed side by side, all if None: memory grows with them.
    """

    epochs: int
    learning_rate: float
    warmup: float = 0.1
    decay: Literal["linear", "cosine"] = "cosine"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    patience: int | None = None
    rows_at_once: int | None = None


@dataclass(frozen=True)
class Parameter:
    """A tensor to train; its rate is the recipe's times `rate`."""

    name: str
    tensor: Tensor
    rate: float = 1.0


class Task(Protocol):
    """What is trained."""

    def parameters(self) -> Sequence[Parameter]:
        """Return what the optimiser may change; always the same, in the same order."""

    def batches(self, seed: int) -> Sequence[Tensor]:
        """Return an epoch's batches, each the indices of rows; the same for the same seed."""

    def loss(self, rows: Tensor) -> Tensor:
        """Return the loss of a batch; what it draws comes from torch's global generator."""

    def validate(self) -> float | None:
        """Return the loss on held-out rows; None if there are none."""


class Epoch(BaseModel, frozen=True):
    """One epoch: the mean training loss, and the validation loss behind it."""

    loss: float
    validation_loss: float | None


class _Position(BaseModel):
    """Where training is: `batch` of `epoch` comes next; `total` is the epoch's loss so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: float = 0.0
    broken: bool = False
    best_epoch: int = 0
    best_loss: float | None = None
    history: list[Epoch] = []


@dataclass(frozen=True)
class TrainerState:
    """Where training is: `position` is JSON.

    The tensors are the trainer's own, to be written before its next step: of a whole backbone a
    copy would be large.
    """

    tensors: Mapping[str, Tensor]
    position: str


class Trainer:
    """Trains one task; the parameters end as those of the best epoch."""

    def __init__(self, task: Task, recipe: Recipe, *, seed: int) -> None:
        self._task = task
        self._recipe = recipe
        self._seed = seed
        self._parameters = {p.name: p for p in task.parameters()}
        self._optimiser = torch.optim.AdamW(
            [{"params": [p.tensor], "rate": p.rate} for p in self._parameters.values()],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
        )
        self._best = self._values()
        self._at = _Position()

    @property
    def history(self) -> list[Epoch]:
        """The epochs that have ended."""
        return list(self._at.history)

    @property
    def best_epoch(self) -> int:
        """The number of epochs after which the parameters were best, from 1; 0 before any."""
        return self._at.best_epoch

    @property
    def step(self) -> int:
        """How many steps have been made."""
        return self._at.step

    @property
    def diverged(self) -> bool:
        """True if the loss is no number any more, or training ended with a far larger one."""
        losses = [epoch.loss for epoch in self._at.history]
        return self._at.broken or (len(losses) > 1 and losses[-1] > DIVERGED * losses[0])

    def run(
        self, *, check: Callable[[], None], on_epoch: Callable[[Epoch], bool] = lambda _: True
    ) -> None:
        """Train to the end, from wherever `restore` left it.

        `check` is called between steps, and between a batch's parts; what it raises leaves the
        trainer in a state worth keeping. `on_epoch` is told of each epoch, and may return False to
        end early.
        """
        while not self._is_over():
            batches = self._task.batches(self._seed + 7919 * self._at.epoch)
            while self._at.batch < len(batches) and not self._at.broken:
                self._step(batches[self._at.batch], len(batches), check)
            epoch = None if self._at.broken else self._end_epoch(len(batches))
            if epoch is None or not on_epoch(epoch):
                break
        self._set_values(self._best)

    def state(self) -> TrainerState:
        """Return where training is."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"parameter/{name}"] = parameter.tensor.detach().contiguous()
            tensors[f"best/{name}"] = self._best[name]
            for key, value in self._optimiser.state[parameter.tensor].items():
                tensors[f"{key}/{name}"] = value.contiguous()
        return TrainerState(tensors, self._at.model_dump_json())

    def restore(self, state: TrainerState) -> None:
        """Go on from what `state` returned, for the same task, recipe and seed; it is used up."""
        tensors = state.tensors
        self._at = _Position.model_validate_json(state.position)
        self._set_values({name: tensors[f"parameter/{name}"] for name in self._parameters})
        self._best = {name: tensors[f"best/{name}"] for name in self._parameters}
        for name, parameter in self._parameters.items():
            kept = {
                key: tensors[f"{key}/{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in tensors
            }
            if kept:
                self._optimiser.state[parameter.tensor] = kept

    def _step(self, rows: Tensor, batches: int, check: Callable[[], None]) -> None:
        torch.manual_seed((self._seed << 20) + self._at.step)
        rate = rate_at(self._at.step, self._recipe.epochs * batches, self._recipe)
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["rate"]
        self._optimiser.zero_grad(set_to_none=True)
        total = self._backward(rows, check)
        if not math.isfinite(total):
            self._at.broken = True
            return
        torch.nn.utils.clip_grad_norm_(
            [p.tensor for p in self._parameters.values()], self._recipe.clip_norm
        )
        self._optimiser.step()
        self._at.total += total
        self._at.batch += 1
        self._at.step += 1

    def _backward(self, rows: Tensor, check: Callable[[], None]) -> float:
        """Gather the gradient of a batch; return its loss."""
        total = 0.0
        for part in torch.split(rows, self._recipe.rows_at_once or len(rows)):
            check()  # what has been gathered by then is of no step, and is thrown away
            loss = self._task.loss(part) * (len(part) / len(rows))
            total += float(loss.detach())
            if not math.isfinite(total):
                break
            loss.backward()  # type: ignore[no-untyped-call]
        return total

    def _end_epoch(self, batches: int) -> Epoch | None:
        loss = self._task.validate()
        if loss is not None and not math.isfinite(loss):
            self._at.broken = True
            return None
        epoch = Epoch(loss=self._at.total / batches, validation_loss=loss)
        self._at.history.append(epoch)
        self._at.epoch, self._at.batch, self._at.total = self._at.epoch + 1, 0, 0.0
        if loss is None or self._at.best_loss is None or loss < self._at.best_loss:
            self._at.best_epoch = self._at.epoch
            self._at.best_loss = loss
            self._best = self._values()
        return epoch

    def _is_over(self) -> bool:
        patience = self._recipe.patience
        return (
            self._at.broken
            or self._at.epoch >= self._recipe.epochs
            or (patience is not None and self._at.epoch - self._at.best_epoch >= patience)
        )

    def _values(self) -> dict[str, Tensor]:
        return {name: p.tensor.detach().clone() for name, p in self._parameters.items()}

    def _set_values(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.tensor.copy_(values[name])


def rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """Return the rate of a step: up in a line, then down along a line or half a cosine."""
    rising = max(1, round(recipe.warmup * steps))
    if step < rising:
        return recipe.learning_rate * (step + 1) / rising
    passed = (step - rising) / max(1, steps - rising)
    if recipe.decay == "linear":
        return recipe.learning_rate * (1 - passed)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * passed))
