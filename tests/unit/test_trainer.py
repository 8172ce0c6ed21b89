"""The training loop on a tiny task: what it resumes is what it would have done."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from training.trainer import Epoch, Parameter, Recipe, Trainer, rate_at

RECIPE = Recipe(epochs=4, learning_rate=0.05)


class Classifier:
    """A linear classifier on random rows, with dropout, so that steps draw numbers."""

    def __init__(self, *, falls: bool = True) -> None:
        numbers = torch.Generator().manual_seed(1)
        self.rows = torch.randn(40, 6, generator=numbers)
        self.targets = (self.rows[:, 0] > 0).long()
        self.weight = torch.zeros(6, 2, requires_grad=True)
        self.scale = torch.ones(2, requires_grad=True)
        self.falls = falls
        self.validations = 0

    def parameters(self) -> list[Parameter]:
        return [Parameter("weight", self.weight), Parameter("scale", self.scale, rate=0.1)]

    def batches(self, seed: int) -> list[Tensor]:
        numbers = torch.Generator().manual_seed(seed)
        return list(torch.randperm(30, generator=numbers).split(8))

    def loss(self, rows: Tensor) -> Tensor:
        dropped = functional.dropout(self.rows[rows], 0.3)
        return functional.cross_entropy(dropped @ self.weight * self.scale, self.targets[rows])

    def validate(self) -> float:
        self.validations += 1
        if not self.falls:
            return float(self.validations)
        with torch.no_grad():
            logits = self.rows[30:] @ self.weight * self.scale
            return float(functional.cross_entropy(logits, self.targets[30:]))


def written(trainer: Trainer) -> bytes:
    """A trainer's state, as a search writes it."""
    state = trainer.state()
    return save(dict(state.tensors), {"trainer": state.position})


class Interrupted(Exception):
    pass


def stop_at(step: int) -> Callable[[], None]:
    calls = iter(range(10**6))

    def check() -> None:
        if next(calls) == step:
            raise Interrupted

    return check


def go_on() -> None:
    return None


def test_it_learns() -> None:
    task = Classifier()
    trainer = Trainer(task, RECIPE, seed=3)
    heard: list[Epoch] = []
    trainer.run(check=go_on, on_epoch=lambda epoch: heard.append(epoch) is None)
    assert heard == trainer.history
    assert [len(heard), trainer.step] == [4, 16]
    assert heard[-1].loss < heard[0].loss < 0.7


@pytest.mark.parametrize("step", [0, 1, 3, 4, 6, 11, 15])
def test_a_run_that_is_resumed_ends_with_the_same_bits(step: int) -> None:
    whole = Trainer(Classifier(), RECIPE, seed=3)
    whole.run(check=go_on)

    first = Trainer(Classifier(), RECIPE, seed=3)
    with pytest.raises(Interrupted):
        first.run(check=stop_at(step))
    torch.manual_seed(99)  # another process draws other numbers
    second = Trainer(Classifier(), RECIPE, seed=3)
    second.restore(first.state())
    assert second.step == step
    second.run(check=go_on)
    assert written(second) == written(whole)
    assert second.history == whole.history


def test_a_batch_in_parts_has_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "dropout", lambda rows, _: rows)
    ends: list[tuple[Tensor, float]] = []
    seen: set[int] = set()
    for at_once in (None, 3):
        task = Classifier()
        loss = task.loss

        def see(rows: Tensor, loss: Callable[[Tensor], Tensor] = loss) -> Tensor:
            seen.add(len(rows))
            return loss(rows)

        task.loss = see  # type: ignore[method-assign]
        recipe = RECIPE.model_copy(update={"rows_at_once": at_once})
        trainer = Trainer(task, recipe, seed=3)
        with pytest.raises(Interrupted):
            trainer.run(check=stop_at(7))  # within a batch, if it has parts
        trainer.run(check=go_on)
        ends.append((task.weight.detach(), trainer.history[-1].loss))
    assert seen == {8, 6, 3, 2}
    assert torch.allclose(ends[0][0], ends[1][0], atol=1e-5)
    assert ends[0][1] == pytest.approx(ends[1][1])


def test_another_seed_ends_elsewhere() -> None:
    ends = []
    for seed in (3, 4):
        trainer = Trainer(Classifier(), RECIPE, seed=seed)
        trainer.run(check=go_on)
        ends.append(written(trainer))
    assert ends[0] != ends[1]


def test_it_stops_when_validation_gets_no_better_and_keeps_the_best() -> None:
    task = Classifier(falls=False)
    trainer = Trainer(task, Recipe(epochs=20, learning_rate=0.05, patience=2), seed=3)
    after: list[Tensor] = []
    trainer.run(check=go_on, on_epoch=lambda _: after.append(task.weight.detach().clone()) is None)
    assert (len(trainer.history), trainer.best_epoch) == (3, 1)
    assert torch.equal(task.weight, after[0])
    assert not torch.equal(after[0], after[2])


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), 8.0])
def test_a_loss_that_blows_up_is_told_and_one_that_is_no_number_ends_it(spoilt: float) -> None:
    task = Classifier()
    loss = task.loss

    def spoil(rows: Tensor) -> Tensor:
        return loss(rows) * (spoilt if trainer.step >= 6 else 1.0)

    task.loss = spoil  # type: ignore[method-assign]
    trainer = Trainer(task, RECIPE, seed=3)
    trainer.run(check=go_on)
    assert trainer.diverged
    assert len(trainer.history) == (4 if spoilt == 8.0 else 1)
    assert torch.isfinite(task.weight).all()

    restored = Trainer(Classifier(), RECIPE, seed=3)
    restored.restore(trainer.state())
    restored.run(check=go_on)
    assert (restored.diverged, restored.history) == (True, trainer.history)


def test_the_listener_may_end_it() -> None:
    trainer = Trainer(Classifier(), RECIPE, seed=3)
    trainer.run(check=go_on, on_epoch=lambda _: False)
    assert len(trainer.history) == 1


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_rate_rises_and_falls(decay: str) -> None:
    recipe = RECIPE.model_copy(update={"decay": decay, "warmup": 0.2})
    rates = [rate_at(step, 20, recipe) for step in range(20)]
    assert rates[:4] == pytest.approx([0.0125, 0.025, 0.0375, 0.05])
    assert all(before > after for before, after in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.005


def test_a_slower_parameter_moves_less() -> None:
    task = Classifier()
    Trainer(task, Recipe(epochs=1, learning_rate=0.05, weight_decay=0), seed=3).run(check=go_on)
    moved = (task.scale.detach() - 1).abs().max()
    assert 0 < float(moved) < float(task.weight.detach().abs().max())


def test_large_gradients_are_cut_to_the_norm_and_small_ones_left_alone() -> None:
    """Of all parameters together, in their own direction."""

    def gradient(clip_norm: float, times: float) -> Tensor:
        task = Classifier()
        loss = task.loss
        task.loss = lambda rows: times * loss(rows)  # type: ignore[method-assign]
        recipe = RECIPE.model_copy(update={"epochs": 1, "clip_norm": clip_norm})
        task.batches = lambda seed: [torch.arange(30)]  # type: ignore[method-assign]
        Trainer(task, recipe, seed=0).run(check=lambda: None)
        found = [each.tensor.grad for each in task.parameters()]
        return torch.cat([each.flatten() for each in found if each is not None])

    free = gradient(1e9, 1.0)
    assert float(free.norm()) > 0.1
    assert torch.equal(gradient(1.0, 1e-3), gradient(1e9, 1e-3))
    cut = gradient(1.0, 1e3)
    assert float(cut.norm()) == pytest.approx(1.0, rel=1e-4)
    assert torch.allclose(cut, free / free.norm(), atol=1e-4)
