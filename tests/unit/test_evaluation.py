"""Metrics against numbers worked out by hand, and against scikit-learn."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest

from training.evaluation import evaluate, macro_f1_interval, wilson
from training.imbalance import macro_f1

LABELS = ["a", "b", "c"]
PROBABILITIES = np.array(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1]], np.float32
)
TARGETS = np.array([0, 0, 1, 1])


def test_figures_by_hand() -> None:
    metrics = evaluate(PROBABILITIES, TARGETS, LABELS)
    assert metrics.rows == 4
    assert metrics.accuracy == 0.75
    assert metrics.accuracy_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert metrics.majority_accuracy == 0.5
    assert metrics.nll == pytest.approx(-np.log([0.7, 0.6, 0.8, 0.4]).mean(), rel=1e-6)
    a, b, c = metrics.classes
    assert (a.rows, a.predicted, a.correct) == (2, 3, 2)
    assert (a.precision, a.recall, a.f1) == (pytest.approx(2 / 3), 1.0, pytest.approx(0.8))
    assert (b.precision, b.recall, b.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert (c.label, c.rows, c.precision, c.recall, c.f1) == ("c", 0, 0.0, 0.0, 0.0)
    # A class that no row has is left out of the mean.
    assert metrics.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)


def test_the_same_as_scikit_learn() -> None:
    reference = importlib.import_module("sklearn.metrics")
    numbers = np.random.default_rng(0)
    targets = numbers.integers(0, 5, 200)
    logits = numbers.normal(size=(200, 5)) + 1.5 * np.eye(5)[targets]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    metrics = evaluate(probabilities, targets, list("abcde"))
    predictions = probabilities.argmax(axis=1)
    assert metrics.accuracy == reference.accuracy_score(targets, predictions)
    assert metrics.macro_f1 == pytest.approx(
        reference.f1_score(targets, predictions, average="macro")
    )
    assert metrics.nll == pytest.approx(reference.log_loss(targets, probabilities), rel=1e-6)


def test_the_interval_of_an_accuracy_by_hand() -> None:
    """Newcombe (1998), table I: 81 of 263, and 0 of 20, where the normal one is empty."""
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=5e-5))
    assert wilson(20, 20)[1] == 1.0


def test_every_class_has_intervals_of_its_own() -> None:
    found = evaluate(np.eye(3)[[0, 0, 0, 1, 1]], np.array([0, 0, 1, 1, 1]), ["a", "b", "c"])
    a, b, c = found.classes
    assert (a.precision_interval, a.recall_interval) == (wilson(2, 3), wilson(2, 2))
    assert (b.precision_interval, b.recall_interval) == (wilson(2, 2), wilson(2, 3))
    assert c.precision_interval == c.recall_interval == (0, 1)


def test_the_interval_of_macro_f1_holds_what_it_promises() -> None:
    """Over 60 samples of one population, the interval misses its F1 about one time in twenty."""
    numbers = np.random.default_rng(0)

    def sample(rows: int) -> tuple[np.ndarray, np.ndarray]:
        targets = numbers.integers(0, 4, rows)
        guesses = numbers.integers(0, 4, rows)
        return targets, np.where(numbers.random(rows) < 0.6, targets, guesses)

    truth = macro_f1(*sample(200_000), 4)
    intervals = [macro_f1_interval(*sample(150), 4) for _ in range(60)]
    hits = sum(low <= truth <= high for low, high in intervals)
    assert 50 <= hits < 60
    narrow, wide = macro_f1_interval(*sample(15_000), 4), macro_f1_interval(*sample(150), 4)
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5


def test_a_probability_of_zero_costs_much_but_not_everything() -> None:
    metrics = evaluate(np.array([[1.0, 0.0]], np.float32), np.array([1]), ["a", "b"])
    assert 15 < metrics.nll < 17
    assert metrics.macro_f1 == 0


def test_the_summary_is_plain_numbers() -> None:
    summary = evaluate(PROBABILITIES, TARGETS, LABELS).summary()
    assert summary["accuracy"] == 0.75
    assert all(type(value) is float for value in summary.values())


@pytest.mark.parametrize(
    ("probabilities", "targets", "labels"),
    [
        (PROBABILITIES[:0], TARGETS[:0], LABELS),
        (PROBABILITIES, TARGETS[:3], LABELS),
        (PROBABILITIES, TARGETS, LABELS[:2]),
    ],
)
def test_shapes_that_disagree_are_refused(
    probabilities: np.ndarray, targets: np.ndarray, labels: list[str]
) -> None:
    with pytest.raises(ValueError, match="shape"):
        evaluate(probabilities, targets, labels)
