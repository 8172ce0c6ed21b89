"""Novelty: uniform on rows like those trained on, high on others, and what is stored is checked."""

from __future__ import annotations

import numpy as np
import pytest

from core.errors import Conflict
from core.novelty import Novelty
from core.preprocessing import FloatArray
from training.novelty import estimate_novelty

CLASSES, DIM = 5, 32
CENTRES = np.random.default_rng(0).normal(size=(CLASSES, DIM)) * 3
SPREAD = np.linspace(0.2, 2, DIM)


def rows(count: int, seed: int) -> tuple[FloatArray, np.ndarray]:
    random = np.random.default_rng(seed)
    targets = random.integers(0, CLASSES, count)
    noise = random.normal(size=(count, DIM)) * SPREAD
    return (CENTRES[targets] + noise).astype(np.float32), targets


@pytest.fixture(scope="module")
def novelty() -> Novelty:
    return estimate_novelty(*rows(400, 1), CLASSES, seed=0)


def test_rows_like_those_trained_on_are_spread_evenly(novelty: Novelty):
    scores = novelty.score(rows(2000, 2)[0])
    for level in (0.1, 0.5, 0.9):
        assert (scores < level).mean() == pytest.approx(level, abs=0.06)


def test_rows_of_no_class_are_novel(novelty: Novelty):
    others = np.random.default_rng(3).normal(size=(200, DIM)).astype(np.float32) * 6
    assert (novelty.score(others) > 0.99).mean() > 0.95


def test_what_is_written_is_read_and_nothing_else(novelty: Novelty):
    data = novelty.write()
    features, _ = rows(10, 4)
    again = Novelty.read(data, CLASSES, DIM)
    np.testing.assert_array_equal(again.score(features), novelty.score(features))
    with pytest.raises(Conflict):
        Novelty.read(data, CLASSES + 1, DIM)
    damaged = Novelty(novelty.means, novelty.scale * np.nan, novelty.quantiles)
    with pytest.raises(Conflict):
        Novelty.read(damaged.write(), CLASSES, DIM)


@pytest.mark.parametrize("count", [2, 3])
def test_few_rows_one_of_each_class(count: int):
    features = np.eye(count, DIM, dtype=np.float32)
    found = estimate_novelty(features, np.arange(count), count, seed=0)
    assert np.isfinite(found.score(features)).all()


def test_equal_rows_and_a_class_that_has_none():
    features = np.ones((8, DIM), np.float32)
    found = estimate_novelty(features, np.zeros(8, np.int64), 2, seed=0)
    scores = found.score(np.concatenate([features[:1], features[:1] * 9]))
    assert np.isfinite(scores).all()
    assert scores[1] == 1
