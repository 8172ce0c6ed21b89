"""The learning curve: rising where rows teach, flat where they do not, ending at the fit itself."""

from __future__ import annotations

import numpy as np
import pytest

from training.fit import fit
from training.learning_curve import learning_curve


def blobs(rows: int, noise: float, dim: int = 60) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(0)
    targets = np.arange(rows) % 6
    centres = np.random.default_rng(1).normal(size=(6, dim))
    return (centres[targets] + noise * numbers.normal(size=(rows, dim))).astype(np.float32), targets


@pytest.mark.parametrize(("noise", "helps"), [(4.0, True), (0.2, False)])
def test_it_tells_whether_more_data_would_help(noise: float, helps: bool) -> None:
    features, targets = blobs(240, noise)
    fitted = fit(features, targets, 6, seed=0)
    curve = learning_curve(features, targets, 6, fitted, seed=0)
    assert [point.rows for point in curve.points] == [48, 96, 192]
    assert curve.held_out == 240
    found = float((fitted.out_of_fold.argmax(axis=1) == targets).mean())
    assert curve.points[-1].accuracy == pytest.approx(found)
    assert curve.more_data_helps is helps
    assert curve.next_gain <= max(0.0, curve.last_gain)
    if helps:
        assert curve.points[0].accuracy + 0.05 < curve.points[-1].accuracy


def test_two_rows_are_enough() -> None:
    features, targets = np.eye(2, dtype=np.float32), np.array([0, 1])
    curve = learning_curve(features, targets, 2, fit(features, targets, 2, seed=0), seed=0)
    assert len(curve.points) == 3
