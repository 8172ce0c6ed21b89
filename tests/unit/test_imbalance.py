"""Remedies for rare classes: left alone when balanced, taken when held-out rows say so."""

from __future__ import annotations

import numpy as np

from training.fit import fit, fit_once
from training.imbalance import Trial, adjust, choose_remedy, is_imbalanced, log_shares, row_weights


def overlapping(counts: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(seed)
    targets = np.repeat(np.arange(len(counts)), counts)
    centres = np.random.default_rng(5).normal(size=(len(counts), 12))
    features = centres[targets] + 1.2 * numbers.normal(size=(len(targets), 12))
    return features.astype(np.float32), targets


def test_balanced_data_is_left_alone() -> None:
    features, targets = overlapping([40, 40, 40])
    result = fit(features, targets, 3, seed=0)
    assert result.remedy == "none"
    assert result.remedies == ()
    assert is_imbalanced(np.repeat([0, 1], [30, 10]))
    assert not is_imbalanced(np.repeat([0, 1], [29, 10]))


def test_a_remedy_is_taken_where_it_helps_rare_classes_on_new_rows() -> None:
    features, targets = overlapping([60, 4] * 10)
    result = fit(features, targets, 20, seed=0)
    plain, *others = result.remedies
    assert [found.remedy for found in result.remedies] == [
        "none", "balanced_weights", "logit_adjustment",
    ]  # fmt: skip
    assert result.remedy != "none"
    chosen = next(found for found in others if found.remedy == result.remedy)
    assert chosen.gain > chosen.gain_error > 0
    assert chosen.macro_f1 == max(found.macro_f1 for found in result.remedies)
    # What was promised holds on rows that had no part in it: rare classes are answered more often.
    new, truth = overlapping([50] * 20, seed=1)
    untouched = fit_once(features, targets, 20, result.strength, "none")
    before, after = (head.predict(new).argmax(axis=1) == truth for head in (untouched, result.head))
    assert after[truth % 2 == 1].mean() > before[truth % 2 == 1].mean() + 0.05
    assert plain.gain == 0


def test_nothing_is_done_within_the_noise() -> None:
    targets = np.repeat([0, 1], [90, 30])
    good = np.where(targets[:, None] == [0, 1], 0.9, 0.1).astype(np.float32)
    other = good.copy()
    assert (
        choose_remedy([Trial("none", good), Trial("balanced_weights", other)], targets, 0)[0] == 0
    )


def test_weights_and_shares_by_hand() -> None:
    targets = np.repeat([0, 1], [3, 1])
    np.testing.assert_allclose(row_weights(targets, 2), [2 / 3, 2 / 3, 2 / 3, 2], rtol=1e-6)
    shares = log_shares(targets, 2)
    np.testing.assert_allclose(np.exp(shares), [0.75, 0.25], rtol=1e-6)
    # Where the model knows nothing but the shares, nothing is left of them.
    np.testing.assert_allclose(adjust(np.array([[0.75, 0.25]], np.float32), shares), 0.5, rtol=1e-5)
