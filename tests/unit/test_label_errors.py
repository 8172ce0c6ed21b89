"""Confident learning: flipped labels are found, hard classes are not accused."""

from __future__ import annotations

import numpy as np

from training.fit import fit
from training.label_errors import find_label_errors


def test_flipped_labels_are_found_and_ranked_first() -> None:
    numbers = np.random.default_rng(0)
    truth = np.arange(600) % 12
    centres = np.random.default_rng(1).normal(size=(12, 16))
    features = (centres[truth] + 0.9 * numbers.normal(size=(600, 16))).astype(np.float32)
    flipped = numbers.random(600) < 0.1
    given = np.where(flipped, (truth + numbers.integers(1, 12, 600)) % 12, truth)
    result = fit(features, given, 12, seed=0)
    doubts = find_label_errors(result.out_of_fold, given)
    hits = [flipped[doubt.row] for doubt in doubts]
    assert sum(hits) / flipped.sum() > 0.6
    assert np.mean(hits) > 0.5
    assert np.mean(hits[:20]) > 0.9
    right = [doubt.suggested == truth[doubt.row] for doubt in doubts if flipped[doubt.row]]
    assert np.mean(right) > 0.9


def test_by_hand() -> None:
    """Class 0 is usually sure (threshold .85), class 1 hardly ever (.55)."""
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], np.float32)
    targets = np.array([0, 0, 1, 1])
    # Row 2 is likelier of class 0, but no likelier than class 0 is used to.
    assert find_label_errors(probabilities, targets) == []
    wrong = np.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.05], [0.3, 0.7], [0.2, 0.8]], np.float32)
    (doubt,) = find_label_errors(wrong, np.array([0, 0, 1, 1, 1]))
    assert (doubt.row, doubt.suggested) == (2, 0)
    assert abs(doubt.margin - 0.9) < 1e-6


def test_a_class_of_one_row_is_no_evidence() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.99, 0.01]], np.float32)
    assert find_label_errors(probabilities, np.array([0, 0, 1])) == []
