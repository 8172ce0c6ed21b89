"""Metrics against numbers worked out by hand, and against scikit-learn."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest

from training.evaluation import evaluate

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
