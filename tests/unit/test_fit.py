"""The fit: is it the optimum, is the strength well chosen, and does it bear odd data?"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import DataError
from training.convex import Softmax
from training.fit import Head, deal, fit, fit_labels, fit_once, fit_ordered, fold_count
from training.judgement import split
from training.ridge import fit_values
from training.strength import STRENGTHS, choose, search


def blobs(
    rows: int, classes: int, dim: int = 20, *, noise: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`rows` rows of Gaussian classes whose centres do not depend on `seed`."""
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    numbers = np.random.default_rng(seed)
    targets = np.arange(rows) % classes
    features = centres[targets] + noise * numbers.normal(size=(rows, dim))
    return features.astype(np.float32), targets.astype(np.int64)


def accuracy(head: Head, features: np.ndarray, targets: np.ndarray) -> float:
    return float((head.predict(features).argmax(axis=1) == targets).mean())


@pytest.mark.parametrize(("rows", "dim"), [(200, 20), (60, 150)])
def test_the_head_is_the_optimum_of_the_stated_loss(rows: int, dim: int) -> None:
    """At an optimum, the gradient over unscaled rows must be zero; computed here in float64."""
    features, targets = blobs(rows, 4, dim, noise=2.0)
    result = fit(features, targets, 4, seed=0)
    scaled = features - features.mean(axis=0, dtype=np.float64)
    length = np.sqrt(np.square(scaled).sum(axis=1).mean())
    residual = result.head.predict(features) - np.eye(4)[targets]
    gradient = (scaled / length).T @ residual / rows
    gradient += result.strength * result.head.weight * length
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    np.testing.assert_allclose(residual.mean(axis=0), 0, atol=1e-4)


def test_the_same_as_scikit_learn_at_the_same_strength() -> None:
    linear_model = importlib.import_module("sklearn.linear_model")
    features, targets = blobs(300, 5, noise=3.0)
    result = fit(features, targets, 5, seed=0)
    scaled = features - features.mean(axis=0)
    scaled /= np.sqrt(np.square(scaled).sum(axis=1).mean())
    reference = linear_model.LogisticRegression(
        C=1 / (result.strength * len(targets)), tol=1e-8, max_iter=10_000
    ).fit(scaled, targets)
    np.testing.assert_allclose(
        result.head.predict(features), reference.predict_proba(scaled), atol=5e-3
    )


def test_the_strength_follows_the_noise() -> None:
    """Rows that say nothing want a strong penalty, rows that say all a weak one."""
    clear, targets = blobs(120, 3, noise=0.3)
    nothing = np.random.default_rng(0).normal(size=clear.shape).astype(np.float32)
    told, untold = fit(clear, targets, 3, seed=0), fit(nothing, targets, 3, seed=0)
    assert untold.strength >= 0.1 > 0.01 > told.strength
    # With no signal the honest answer is the share of each class.
    np.testing.assert_allclose(untold.head.predict(nothing), 1 / 3, atol=0.15)


def test_out_of_fold_probabilities_are_honest() -> None:
    """On pure noise they score like chance, where the head on its own rows scores far better."""
    features = np.random.default_rng(0).normal(size=(100, 400)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 2, 100)
    result = fit(features, targets, 2, seed=0)
    held_out = (result.out_of_fold.argmax(axis=1) == targets).mean()
    assert held_out < 0.65
    assert accuracy(result.head, features, targets) > 0.9
    np.testing.assert_allclose(result.out_of_fold.sum(axis=1), 1, atol=1e-5)


def test_out_of_fold_accuracy_foretells_that_on_new_rows() -> None:
    features, targets = blobs(300, 6, noise=2.5)
    result = fit(features, targets, 6, seed=0)
    expected = accuracy(result.head, *blobs(3000, 6, noise=2.5, seed=1))
    found = float((result.out_of_fold.argmax(axis=1) == targets).mean())
    assert found == pytest.approx(expected, abs=0.06)
    assert 0.5 < expected < 0.98


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0.0), (50.0, 100.0)])
def test_the_size_and_place_of_features_do_not_matter(scale: float, offset: float) -> None:
    features, targets = blobs(150, 3, noise=2.0)
    plain = fit(features, targets, 3, seed=0)
    moved = (features * scale + offset).astype(np.float32)
    other = fit(moved, targets, 3, seed=0)
    assert other.strength == plain.strength
    np.testing.assert_allclose(other.head.predict(moved), plain.head.predict(features), atol=1e-3)


def test_the_same_for_any_number_of_threads() -> None:
    features, targets = blobs(200, 5, noise=2.0)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(fit(features, targets, 5, seed=3))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_array_equal(other.head.weight, results[0].head.weight)
        np.testing.assert_array_equal(other.out_of_fold, results[0].out_of_fold)


def test_another_seed_deals_other_folds() -> None:
    _, targets = blobs(50, 5)
    assert (deal(targets, 5, 0) != deal(targets, 5, 1)).any()
    np.testing.assert_array_equal(deal(targets, 5, 0), deal(targets, 5, 0))


def test_folds_are_stratified_and_of_one_size() -> None:
    targets = np.repeat(np.arange(7), [2, 5, 11, 3, 8, 20, 4])
    fold_of = deal(targets, 5, 0)
    sizes = np.bincount(fold_of, minlength=5)
    assert sizes.max() - sizes.min() <= 1
    for label in range(7):
        shares = np.bincount(fold_of[targets == label], minlength=5)
        assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize(("rows", "folds"), [(2, 2), (5, 2), (6, 3), (10, 5), (2000, 5), (2001, 3)])
def test_fewer_folds_for_very_few_and_for_many_rows(rows: int, folds: int) -> None:
    assert fold_count(rows) == folds


@pytest.mark.parametrize(
    "targets",
    [
        [0, 1],
        [0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 1],
        [0, 0, 0, 1, 1, 1, 2],
        [0, 1, 2, 3, 4, 5],
        [0, 0, 2, 2],
    ],
)
def test_few_and_lone_rows_do_no_harm(targets: list[int]) -> None:
    """Two rows, classes with one row, nothing but such classes, and a class without any."""
    features = np.random.default_rng(0).normal(size=(len(targets), 8)).astype(np.float32)
    classes = max(targets) + 1
    result = fit(features, np.array(targets), classes, seed=0)
    assert result.head.weight.shape == (8, classes)
    assert result.out_of_fold.shape == (len(targets), classes)
    assert np.isfinite(result.head.weight).all()
    assert np.isfinite(result.out_of_fold).all()


def test_lone_rows_do_not_sway_the_choice() -> None:
    """Held out they are always wrong, but about as wrong at every strength."""
    features, targets = blobs(90, 3, noise=0.3)
    lone = np.random.default_rng(1).normal(size=(10, features.shape[1])).astype(np.float32)
    without = fit(features, targets, 3, seed=0)
    along = fit(np.vstack([features, lone]), np.append(targets, np.arange(3, 13)), 13, seed=0)
    assert without.strength / 11 < along.strength < without.strength * 11
    assert accuracy(along.head, lone, np.arange(3, 13)) == 1


def test_rows_that_are_all_alike_give_the_shares_of_the_classes() -> None:
    features = np.ones((10, 4), np.float32)
    result = fit(features, np.array([0] * 7 + [1] * 3), 2, seed=0)
    np.testing.assert_allclose(result.head.predict(features)[0], [0.7, 0.3], atol=1e-3)


def test_numbers_that_are_not_finite_are_refused() -> None:
    features, targets = blobs(10, 2)
    features[3, 1] = np.nan
    with pytest.raises(DataError, match="finite"):
        fit(features, targets, 2, seed=0)


def test_of_equals_the_strongest_is_chosen() -> None:
    row = np.array([0.2, 0.4, 0.6, 0.8])
    clearly_worse, noisily_worse = row + 0.5, row + np.array([0.9, -0.8, 0.9, -0.8])
    assert choose(np.stack([clearly_worse, row, row])) == 1
    assert choose(np.stack([clearly_worse, noisily_worse, row])) == 1
    assert choose(np.stack([clearly_worse, row + 0.005, row])) == 1
    assert choose(np.stack([clearly_worse, row + 0.02, row])) == 2


def test_the_report_names_every_strength_that_was_tried() -> None:
    features, targets = blobs(100, 4, noise=3.0)
    result = fit(features, targets, 4, seed=0)
    tried = [candidate.strength for candidate in result.candidates]
    assert tried == list(STRENGTHS[: len(tried)])
    assert result.strength in tried
    assert len(tried) < len(STRENGTHS)


def test_of_many_rows_one_fold_finds_the_strength_and_every_row_stays_held_out() -> None:
    """About the strength that all would find; and probabilities are of fits without the row."""
    features, targets = blobs(2100, 6, noise=3.0)
    result = fit(features, targets, 6, seed=0)
    truth = torch.nn.functional.one_hot(torch.from_numpy(targets)).float()
    together = search(features, truth, result.fold_of, Softmax(6))
    assert together.strength / 11 < result.strength < together.strength * 11
    for fold in range(result.folds):
        mine = result.fold_of == fold
        apart = fit_once(features[~mine], targets[~mine], 6, result.strength, "none")
        np.testing.assert_allclose(
            result.out_of_fold[mine], apart.predict(features[mine]), atol=1e-2
        )


def test_rows_that_repeat_each_other_are_in_one_fold() -> None:
    """And without any the folds are what they are without knowing."""
    targets = np.repeat(np.arange(4), [20, 14, 30, 9])
    np.testing.assert_array_equal(deal(targets, 5, 3, np.arange(73)), deal(targets, 5, 3))
    twins = np.arange(73)
    twins[[30, 31, 40]] = 5  # of other classes too
    twins[40:60:2] = 40
    fold_of = deal(targets, 5, 3, twins)
    for first in np.unique(twins):
        assert len(np.unique(fold_of[twins == first])) == 1
    assert set(fold_of) == set(range(5))
    # Two different rows only, and one: there is nothing to hold out but copies.
    assert set(deal(targets, 5, 3, np.arange(73) % 2)) == {0, 1}
    np.testing.assert_array_equal(deal(targets, 5, 3, np.zeros(73, int)), deal(targets, 5, 3))


@pytest.mark.parametrize("kind", ["classes", "order", "labels", "values"])
def test_copies_do_not_vouch_for_each_other(kind: str) -> None:
    """Every row is there twice, and its label is drawn by lot: there is nothing to know."""
    numbers = np.random.default_rng(0)
    features = np.repeat(numbers.normal(size=(150, 200)), 2, axis=0).astype(np.float32)
    drawn = np.repeat(numbers.integers(0, 2, 150), 2)
    twins = np.repeat(np.arange(0, 300, 2), 2)

    def fitted(twins: np.ndarray | None) -> float:
        given: dict[str, Any] = {"seed": 0, "twins": twins}
        if kind == "labels":
            outputs = fit_labels(features, np.eye(2, dtype=np.float32)[drawn], drawn, **given)
        elif kind == "values":
            found = fit_values(features, drawn.astype(np.float64), drawn, **given)
            return float(((found.out_of_fold[:, 0] > 0.5) == drawn).mean())
        else:
            outputs = (fit if kind == "classes" else fit_ordered)(features, drawn, 2, **given)
        return float((outputs.out_of_fold.argmax(axis=1) == drawn).mean())

    assert fitted(None) > 0.8
    assert fitted(twins) == pytest.approx(0.5, abs=0.1)


def test_copies_judge_together_in_a_search() -> None:
    targets, twins = np.arange(240) % 3, np.arange(240)
    twins[120:] = twins[:120]
    for rows in (240, 90):
        for fold in split(targets[-rows:], 0, twins[-rows:]):
            assert len(fold.held_out) > 0
            assert not set(twins[-rows:][fold.train]) & set(twins[-rows:][fold.held_out])
