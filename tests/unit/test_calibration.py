"""Temperature: is it the best one, is it in the head, and are the figures what they are called?"""

from __future__ import annotations

import numpy as np
import pytest

from training.assessment import Alternative, assess
from training.calibration import (
    BINS,
    Bin,
    cross_rescale,
    expected_error,
    fit_temperature,
    fold_into,
    quality,
    reliability,
    rescale,
)
from training.export import export_head
from training.fit import Head, deal, fit


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)


def drawn(rows: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are `sharpness` times too sure in logits, and what really happened."""
    numbers = np.random.default_rng(0)
    logits = 1.5 * numbers.normal(size=(rows, 5))
    truth = softmax(logits)
    targets = (truth.cumsum(axis=1) > numbers.random((rows, 1))).argmax(axis=1)
    return softmax(sharpness * logits), targets


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(sharpness: float) -> None:
    probabilities, targets = drawn(20_000, sharpness)
    assert fit_temperature(probabilities, targets) == pytest.approx(sharpness, rel=0.05)


def test_wrong_confidence_is_mended_and_answers_stay() -> None:
    probabilities, targets = drawn(4_000, 3.0)
    scaled, temperature = cross_rescale(probabilities, targets, deal(targets, 5, 0))
    before, after = quality(probabilities, targets), quality(scaled, targets)
    assert before.ece > 0.15
    assert after.ece < 0.03
    assert after.nll < before.nll - 0.1
    np.testing.assert_array_equal(scaled.argmax(axis=1), probabilities.argmax(axis=1))
    assert temperature > 2


@pytest.mark.parametrize("classes", [2, 5])
def test_few_separable_rows_are_no_proof(classes: int) -> None:
    """All of 50 rows are answered rightly: that is 51 in 52 (Platt 1999), and not certainty."""
    wrong = 0.1 / (classes - 1)
    row = np.array([0.9] + [wrong] * (classes - 1), np.float32)
    probabilities = np.tile(row, (50, 1))
    temperature = fit_temperature(probabilities, np.zeros(50, np.int64))
    assert rescale(probabilities, temperature)[0, 0] == pytest.approx(51 / 52, abs=1e-4)


def test_head_onnx_gives_the_scaled_probabilities() -> None:
    numbers = np.random.default_rng(0)
    head = Head(
        numbers.normal(size=(8, 3)).astype(np.float32), numbers.normal(size=3).astype(np.float32)
    )
    features = numbers.normal(size=(10, 8)).astype(np.float32)
    folded = fold_into(head, 1.7)
    np.testing.assert_allclose(
        folded.predict(features), rescale(head.predict(features), 1.7), atol=1e-5
    )
    export_head(folded, features)  # compares ONNX Runtime with torch


def test_the_error_by_hand() -> None:
    bins = (Bin(rows=3, confidence=0.9, accuracy=0.6), Bin(rows=1, confidence=0.4, accuracy=1.0))
    assert expected_error(bins) == pytest.approx((3 * 0.3 + 0.6) / 4)
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5]], np.float32)
    found = reliability(probabilities, np.array([0, 1]))
    assert len(found) == BINS
    assert (found[-1].rows, found[-1].confidence, found[-1].accuracy) == (1, 1.0, 1.0)
    assert sum(b.rows for b in found) == 2


def test_a_validation_file_is_calibrated_on_rows_of_its_own() -> None:
    """Its labels are noise, so the only honest head is one that is sure of nothing."""
    numbers = np.random.default_rng(0)
    targets = np.arange(200) % 2
    features = (4 * targets[:, None] + numbers.normal(size=(200, 6))).astype(np.float32)
    fitted = fit(features, targets, 2, seed=0)
    other = numbers.permutation(targets)
    found = assess(fitted, targets, ["a", "b"], (features, other))
    assert found.source == "validation_file"
    assert found.calibration.before.ece > 0.3
    assert found.calibration.after.ece < 0.15
    assert found.cross_validated_accuracy > 0.95
    assert found.head.predict(features).max() < 0.7


def test_the_rows_that_a_tuned_model_was_judged_on_speak_for_it() -> None:
    """All of them in its name, or else in that of the head on frozen features."""
    numbers = np.random.default_rng(0)
    targets = np.arange(90) % 2
    features = numbers.normal(size=(90, 6)).astype(np.float32)
    fitted = fit(features, targets, 2, seed=0)
    knowing = np.where(np.eye(2)[targets] > 0, 0.9, 0.1).astype(np.float32)
    labels = ["a", "b"]
    every = assess(fitted, targets, labels, None, Alternative(fitted.head, np.arange(90), knowing))
    assert not every.is_frozen
    assert (every.out_of_fold.argmax(axis=1) == targets).all()
    third = np.arange(0, 90, 3)
    some = assess(fitted, targets, labels, None, Alternative(fitted.head, third, knowing[third]))
    assert some.is_frozen
    assert (some.out_of_fold.argmax(axis=1) == targets).mean() < 0.7
    # What is compared with a validation file is the same model in both cases.
    other = (features, numbers.permutation(targets))
    beside = assess(fitted, targets, labels, other, Alternative(fitted.head, third, knowing[third]))
    assert (some.cross_validated_accuracy, beside.cross_validated_accuracy) == (1, 1)
