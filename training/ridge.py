"""Features to a value: ridge regression (Hoerl & Kennard 1970), its strength by cross-validation.

    centre and scale ──▶ every L2 strength × (k folds, all rows), in closed form ──▶ choose

One eigendecomposition of the covariance, or of the rows' products where they are fewer, gives the
optimum at all strengths. Features are scaled as for classes (training.fit) and values standardised,
so that one grid suits all data. A row's loss is its negative log-likelihood under a normal
distribution of the errors of that strength, and the choice is the same as for classes.

The interval is conformal: held-out errors, of which the quantile is taken that would hold 90 % of
rows like them (Vovk et al. 2005; of cross-validated errors Barber et al. 2021, whose guarantee is
weaker, and which in practice hold about what they say). Not here: metrics (training.regression).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.errors import DataError
from core.manifests import Interval
from core.preprocessing import FloatArray
from training.convex import single_threaded
from training.fit import Fit, Head, IntArray, deal, fold_count
from training.scaling import Scaling
from training.strength import Candidate, choose

STRENGTHS = tuple(float(10.0**exponent) for exponent in np.arange(1, -7.1, -0.5))
"""Strong to weak: `loss = mean(error²) / 2 + strength / 2 · ‖w‖²`, of standardised values."""

COVERAGE = 0.9
_SMALLEST_VARIANCE = 1e-12

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Rows:
    """Rows to fit on, scaled, and their standardised values."""

    features: Tensor
    values: Tensor

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return weights [dim, strengths] and biases [strengths]."""
        centre, mean = self.features.mean(dim=0), self.values.mean()
        rows, values = self.features - centre, self.values - mean
        count, dim = rows.shape
        strengths = torch.tensor(STRENGTHS, dtype=torch.float64)
        if count < dim:
            sizes, axes = torch.linalg.eigh(rows @ rows.T / count)
            along = (axes.T @ values / count).unsqueeze(1) / (sizes.unsqueeze(1) + strengths)
            weights = rows.T @ (axes @ along)
        else:
            sizes, axes = torch.linalg.eigh(rows.T @ rows / count)
            along = (axes.T @ (rows.T @ values) / count).unsqueeze(1)
            weights = axes @ (along / (sizes.unsqueeze(1) + strengths))
        return weights, mean - centre @ weights


def fit_values(
    features: FloatArray, values: DoubleArray, groups: IntArray, *, seed: int,
    twins: IntArray | None = None,
) -> Fit:  # fmt: skip
    """Fit a head on features [n, dim] and values [n], n ≥ 2; folds have their share of `groups`.

    Rows of the same of `twins` [n] are held out together. Raises `DataError` if a feature is not
    finite.
    """
    if not np.isfinite(features).all():
        raise DataError("the backbone gives numbers that are not finite for these rows")
    scaling = Scaling.of(features)
    scaled = scaling.apply(features).double()
    mean, deviation = float(values.mean()), float(values.std()) or 1.0
    standard = torch.from_numpy((values - mean) / deviation)
    fold_of = deal(groups, fold_count(len(values)), seed, twins)
    folds = int(fold_of.max()) + 1
    kept = [torch.from_numpy(fold_of != fold) for fold in range(folds)]
    parts = [_Rows(scaled[mask], standard[mask]) for mask in kept] + [_Rows(scaled, standard)]
    with single_threaded() as pool:
        solutions = list(pool.map(_Rows.solve, parts))
    held_out = torch.empty(len(values), len(STRENGTHS), dtype=torch.float64)
    for mask, (weights, biases) in zip(kept, solutions, strict=False):
        held_out[~mask] = scaled[~mask] @ weights + biases
    errors = (held_out - standard.unsqueeze(1)).numpy()
    losses = np.stack([row_losses(column) for column in errors.T])
    chosen = choose(losses)
    weight, bias = scaling.unscaled(deviation * _solution(*solutions[-1], chosen))
    return Fit(
        head=Head(weight, (bias + mean).astype(np.float32), "identity"),
        strength=STRENGTHS[chosen],
        folds=folds,
        candidates=tuple(
            Candidate(
                strength=strength,
                nll=float(loss.mean()),
                rmse=float(deviation * np.sqrt(np.square(error).mean())),
            )
            for strength, loss, error in zip(STRENGTHS, losses, errors.T, strict=True)
        ),
        out_of_fold=(mean + deviation * held_out.numpy()[:, [chosen]]).astype(np.float32),
        fold_of=fold_of,
    )


def path(features: FloatArray, values: DoubleArray) -> Iterator[tuple[float, Head]]:
    """Yield a head for each of `STRENGTHS`, fitted on features [n, dim] and standardised values."""
    scaling = Scaling.of(features)
    with single_threaded():
        solved = _Rows(scaling.apply(features).double(), torch.from_numpy(values)).solve()
    for number, strength in enumerate(STRENGTHS):
        yield strength, Head(*scaling.unscaled(_solution(*solved, number)), "identity")


def row_losses(errors: DoubleArray) -> DoubleArray:
    """Return each row's negative log-likelihood [n] in nats, but for a constant."""
    variance = max(float(np.square(errors).mean()), _SMALLEST_VARIANCE)
    losses: DoubleArray = 0.5 * (np.square(errors) / variance + np.log(variance))
    return losses


def _solution(weights: Tensor, biases: Tensor, number: int) -> Tensor:
    """Return weight and, as the last row, bias [dim + 1, 1] of one of the strengths."""
    return torch.cat([weights[:, number], biases[number : number + 1]]).unsqueeze(1)


def conformal(errors: DoubleArray, coverage: float = COVERAGE) -> Interval:
    """Return the interval that held-out errors [n], n ≥ 9, give for new rows."""
    sizes = np.sort(np.abs(errors))
    rank = min(len(sizes), int(np.ceil(coverage * (len(sizes) + 1) - 1e-9)))
    return Interval(half_width=float(sizes[rank - 1]), coverage=coverage)
