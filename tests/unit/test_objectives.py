"""What tuning strives for by task: losses, heads, and what held-out rows say, with a remedy too.

The part that is tuned here sees what frozen features leave out, so that tuning has something to do.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.datasets import Modality
from core.jobs import EarlyStopping, Hyperparameters
from core.preprocessing import FloatArray
from tests.unit.test_imbalance import overlapping
from training.activations import Batch
from training.convex import Ordered
from training.fit import Head, fit_labels, fit_once, fit_ordered
from training.gradual import Gradual
from training.imbalance import row_weights
from training.objectives import Classes, Labels, Objective, Ranks, Values, class_likelihoods
from training.plan import DEFAULTS
from training.ridge import fit_values
from training.rungs import Source
from training.search import Tuned, tuned
from training.search_state import SearchState
from training.trainer import Parameter, Recipe, Trainer
from training.tuning import CachedRows, Regularisation, Tuning

ROWS, DIM, CLASSES, UNIT = 320, 8, 4, 40.0
NUMBERS = np.random.default_rng(3)
FEATURES, HIDDEN, NOISE = NUMBERS.normal(size=(3, ROWS, DIM)).astype(np.float32)
SUMS = FEATURES + HIDDEN + 0.5 * NOISE
RANKS = np.digitize(SUMS[:, 0], [-2, 0.5, 1.5]).astype(np.int64)
LABELS = (SUMS[:, :3] > [0, 0.5, 1.5]).astype(np.float32)
VALUES = 500 + UNIT * SUMS[:, 0].astype(np.float64)
EVERY = np.arange(ROWS)
OBJECTIVES: dict[str, Objective] = {
    "none": Classes(RANKS, CLASSES),
    "balanced_weights": Classes(RANKS, CLASSES, "balanced_weights"),
    "logit_adjustment": Classes(RANKS, CLASSES, "logit_adjustment"),
    "ranks": Ranks(RANKS, CLASSES),
    "labels": Labels(LABELS, 3),
    "values": Values(VALUES, 0),
}


class Part:
    """Features, to which training adds what it makes of as many hidden numbers."""

    modality = Modality.IMAGE
    rows_at_once = None

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._added = nn.Parameter(torch.zeros(dim, dim))
        self._share = 1.0

    def __call__(self, batch: Batch) -> Tensor:
        features, hidden = torch.split(batch.hidden, self._dim, dim=1)
        return features + self._share * (hidden @ self._added)

    def parameters(self) -> list[Parameter]:
        return [Parameter("added", self._added)]

    def set_share(self, share: float) -> None:
        self._share = share


class Watcher:
    """Keeps the last state of a search."""

    state = b""

    def save(self, step: int, state: bytes) -> None:
        self.state = state

    def check(self) -> None: ...
    def on_epoch(self, *_: object) -> None: ...
    def on_slowdown(self, *_: object) -> None: ...
    def on_end(self, *_: object) -> None: ...
    def on_stop(self, *_: object) -> None: ...
    def on_step(self, *_: object) -> None: ...


def rows_of(objective: Objective, features: FloatArray, hidden: FloatArray) -> CachedRows:
    both = torch.from_numpy(np.hstack([features, hidden]))
    return CachedRows([[row] for row in both], objective.targets)


def fitted(name: str, objective: Objective, strength: float) -> tuple[Head, float]:
    """What the frozen fit gives, and its strength."""
    if name == "labels":
        found = fit_labels(FEATURES, LABELS, objective.groups, seed=0)
    elif name == "values":
        found = fit_values(FEATURES, VALUES, objective.groups, seed=0)
    elif name == "ranks":
        found = fit_ordered(FEATURES, RANKS, CLASSES, seed=0)
    else:
        remedy: Any = name
        return fit_once(FEATURES, RANKS, CLASSES, strength, remedy), strength
    return found.head, found.strength


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_begins_with_the_fit_and_ends_in_a_likelier_head_of_its_kind(name: str) -> None:
    objective, unit = OBJECTIVES[name], UNIT if name == "values" else 1
    expected, strength = fitted(name, objective, 1e-2)
    head = objective.fit_at(FEATURES, EVERY, strength)
    given = expected.predict(FEATURES)
    np.testing.assert_allclose(objective.serve(head).predict(FEATURES), given, atol=5e-3 * unit)

    rows = rows_of(objective, FEATURES, HIDDEN)
    task = Tuning(
        Part(DIM), objective, head, rows, rows, batch_size=32,
        regularisation=Regularisation(dropout=0.0),
    )  # fmt: skip
    np.testing.assert_allclose(task.head().predict(FEATURES), given, atol=5e-3 * unit)
    Trainer(task, Recipe(epochs=5, learning_rate=0.03), seed=0).run(check=lambda: None)
    trained = task.head()
    after = objective.likelihoods(trained.predict(task.features(rows)), objective.targets)
    assert (after - objective.likelihoods(given, objective.targets)).mean() > 0.2
    assert trained.output == head.output
    if name == "ranks":
        ranks = Ordered(CLASSES).ranks.numpy()
        line = np.outer(trained.weight @ ranks, ranks)
        np.testing.assert_allclose(trained.weight, line, atol=1e-5)


def test_losses_by_hand() -> None:
    logits = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))
    truth, labels = torch.from_numpy(RANKS), torch.from_numpy(LABELS)
    each = functional.cross_entropy(logits, truth, reduction="none")
    weights = torch.from_numpy(row_weights(RANKS, CLASSES))
    sure = torch.sigmoid(logits[:, :3])
    several = -(labels * sure.log() + (1 - labels) * (1 - sure).log()).sum(dim=1)
    errors = logits[:, 0].double() - torch.from_numpy((VALUES - VALUES.mean()) / VALUES.std())
    for name, width, targets, expected in (
        ("none", 4, truth, each.mean()), ("balanced_weights", 4, truth, (weights * each).mean()),
        ("logit_adjustment", 4, truth, each.mean()), ("ranks", 4, truth, each.mean()),
        ("labels", 3, labels, several.mean()),
        ("values", 1, torch.from_numpy(VALUES), errors.square().mean() / 2),
    ):  # fmt: skip
        found = OBJECTIVES[name].loss(logits[:, :width], targets, 0.0)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_scores_by_hand() -> None:
    assert OBJECTIVES["ranks"].score(np.eye(4)[[0, 1, 2, 3]], np.array([0, 1, 2, 2])) == (
        0.75, None, None,
    )  # fmt: skip
    outputs = np.array([[0.6, 0.1], [0.4, 0.9]], np.float32)
    assert OBJECTIVES["labels"].score(outputs, np.array([[1, 0], [1, 1]])).accuracy == 0.5
    values = np.linspace(0, 1, 19)
    found = OBJECTIVES["values"].score((values + 3)[:, None].astype(np.float32), values)
    assert found.accuracy is None
    assert found.rmse == pytest.approx(3)
    assert found.interval is not None
    assert found.interval.half_width == pytest.approx(3)


def searched(
    objective: Objective, features: FloatArray, hidden: FloatArray
) -> tuple[Tuned, SearchState]:
    """A search that keeps a step: what ships, and what it knew."""
    few, watcher = Hyperparameters(n_epochs=3, learning_rate_multiplier=10), Watcher()
    plan = DEFAULTS[Modality.TEXT].plan(objective.groups, few, EarlyStopping(patience=3))
    rows, dim = rows_of(objective, features, hidden), features.shape[1]
    source = Source(1, objective, features, lambda _: Part(dim), lambda _: rows)
    search = Gradual(
        source, replace(plan, contrast=0.0), seed=0, deadline=time.monotonic() + 600,
        watcher=watcher,
    )  # fmt: skip
    outcome = search.run()
    assert outcome.part is not None
    seen: Any = outcome.part(Batch(torch.from_numpy(np.hstack([features, hidden])), None))
    trunk: Any = None
    found = tuned(outcome, seen.detach().numpy(), objective, trunk)
    return found, SearchState.from_bytes(watcher.state)


def test_a_search_on_values_tells_and_ships_them_as_they_are() -> None:
    found, state = searched(OBJECTIVES["values"], FEATURES, HIDDEN)
    for step, record in zip(state.steps, state.records, strict=True):
        assert record.outputs.mean() == pytest.approx(VALUES.mean(), abs=UNIT)
        assert (step.accuracy, step.rmse is None, step.interval is None) == (None, False, False)
    errors = found.head.predict(found.features)[:, 0] - VALUES
    assert np.sqrt(np.square(errors).mean()) < 0.7 * (state.steps[0].rmse or 0)


def test_a_search_has_the_remedy_of_the_frozen_head_from_its_first_step_to_what_ships() -> None:
    def rare(outputs: FloatArray) -> float:
        """How often a rare class is answered."""
        return float((outputs.argmax(axis=1) % 2 == 1).mean())

    features, targets = overlapping([70, 8] * 4)
    blurred = features + np.random.default_rng(0).normal(size=features.shape).astype(np.float32)
    plain, before = searched(Classes(targets, 8), blurred, features)
    objective = Classes(targets, 8, "logit_adjustment")
    found, state = searched(objective, blurred, features)
    for record, other in zip(state.records, before.records, strict=False):
        assert rare(record.outputs) > 1.2 * rare(other.outputs)
    assert rare(found.head.predict(found.features)) > rare(plain.head.predict(plain.features))
    # Rows as they come would prefer to be rid of it, and must not have their way.
    truth, pair = found.targets, (plain.outputs, found.outputs)
    as_they_come = [class_likelihoods(each, truth).mean() for each in pair]
    assert as_they_come[0] > as_they_come[1]
    weighed = [objective.likelihoods(each, truth).mean() for each in pair]
    assert weighed[0] < weighed[1]
