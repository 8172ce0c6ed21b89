"""How strong the penalty is to be: the path of strengths that cross-validation chooses from.

Strengths go from strong to weak, each fit starting from the last (Friedman, Hastie & Tibshirani
2010), and the path ends where nothing is gained. The log-likelihood of held-out rows decides, not
their accuracy, which is too coarse on a few rows: choosing by it cost up to two points. Of
strengths that are within one standard error of the best, the strongest is taken (Breiman et al.
1984), the error being that of the row by row difference.

Only the folds that judge go along the path. What is fitted on the others' rows, and on all rows, is
fitted once, at the strength that was chosen.

Not here: one step of a path (training.convex), what is made of it (training.fit).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel
from torch import Tensor

from core.errors import DataError
from core.preprocessing import FloatArray
from training.convex import Loss, Path, Sigmoid, single_threaded
from training.scaling import Axes

STRENGTHS = tuple(float(10.0**exponent) for exponent in np.arange(0, -6.1, -0.5))
"""L2 strengths, strong to weak: `loss = mean(-log p) + strength / 2 · ‖W‖²`, without the bias."""

PATIENCE = 2
"""The path ends when as many weaker strengths have not been better than the one to be chosen."""

_NEGLIGIBLE = 0.01
"""Nats per row that are not worth a weaker penalty: on separable classes it never stops helping."""

_SMALLEST = 1e-7

IntArray = npt.NDArray[np.int64]
DoubleArray = npt.NDArray[np.float64]


class Candidate(BaseModel, frozen=True):
    """One strength that was tried, and how the rows held out fared: a line of the report.

    Values have no `accuracy` but a root mean squared error.
    """

    strength: float
    accuracy: float | None = None
    nll: float
    rmse: float | None = None


@dataclass(frozen=True)
class Search:
    """What was found: fits of `strength` without each fold's rows, and last one with all.

    `solutions` are along `axes`; `candidates` were judged by the folds that judge.
    """

    axes: Axes
    fold_of: IntArray
    strength: float
    solutions: list[Tensor]
    candidates: tuple[Candidate, ...]
    _rows: Tensor
    _loss: Loss
    _paths: list[Path]

    def held_out(self, solutions: list[Tensor]) -> FloatArray:
        """Return each row's outputs [n, width] by the solution that was found without it."""
        outputs = torch.empty(len(self._rows), solutions[0].shape[1])
        for fold, solution in enumerate(solutions[:-1]):
            mine = torch.from_numpy(self.fold_of == fold)
            outputs[mine] = _outputs(self._rows[mine], solution, self._loss)
        array: FloatArray = outputs.numpy()
        return array

    def refit(self, weights: FloatArray) -> list[Tensor]:
        """Return the solutions of the same strength for rows that count as `weights` [n] say."""
        counted = torch.from_numpy(weights)
        apart = [counted[mask] for mask in _without(self.fold_of)]
        with single_threaded() as pool:
            for path, each in zip(self._paths, [*apart, counted], strict=True):
                path.weigh(each)
            return list(pool.map(Path.step, self._paths, repeat(self.strength)))


def search(
    features: FloatArray, truth: Tensor, fold_of: IntArray, loss: Loss, *, judges: int | None = None
) -> Search:
    """Find the strength for features [n, dim] and truth [n, width] by the folds `fold_of` [n].

    The first `judges` folds judge, or all. Raises `DataError` if a feature is not finite.
    """
    if not np.isfinite(features).all():
        raise DataError("the backbone gives numbers that are not finite for these rows")
    with single_threaded() as pool:
        axes = Axes.of(features)
        rows = axes.apply(features)
        kept = _without(fold_of)
        paths = [Path(rows[mask], truth[mask], loss, axes.variances) for mask in kept]
        paths.append(Path(rows, truth, loss, axes.variances))
        judging = kept[:judges]
        answers = torch.cat([truth[~mask] for mask in judging]).numpy()
        candidates: list[Candidate] = []
        tried: list[list[Tensor]] = []
        losses = np.empty((0, len(answers)))
        for strength in STRENGTHS:
            tried.append(list(pool.map(Path.step, paths[: len(judging)], repeat(strength))))
            outputs = [_outputs(rows[~m], s, loss) for m, s in zip(judging, tried[-1], strict=True)]
            lost, right = _judge(torch.cat(outputs).numpy(), answers, loss)
            candidates.append(
                Candidate(strength=strength, accuracy=float(right.mean()), nll=float(lost.mean()))
            )
            losses = np.vstack([losses, lost])
            index = choose(losses)
            if len(losses) - 1 - index >= PATIENCE:
                break
        others = list(pool.map(Path.step, paths[len(judging) :], repeat(STRENGTHS[index])))
    return Search(
        axes=axes,
        fold_of=fold_of,
        strength=STRENGTHS[index],
        solutions=tried[index] + others,
        candidates=tuple(candidates),
        _rows=rows,
        _loss=loss,
        _paths=paths,
    )


def choose(losses: DoubleArray) -> int:
    """Return which of the strengths, strong to weak, to take; `losses` is [strengths, rows].

    The first whose mean loss is within one standard error of the lowest, or negligibly above it.
    """
    excess = losses - losses[losses.mean(axis=1).argmin()]
    error = excess.std(axis=1) / np.sqrt(losses.shape[1])
    return int(np.flatnonzero(excess.mean(axis=1) <= np.maximum(error, _NEGLIGIBLE))[0])


def label_losses(probabilities: FloatArray, targets: FloatArray) -> DoubleArray:
    """Return each row's negative log-likelihood [n], the sum over its labels, in nats."""
    chosen = np.where(targets >= 0.5, probabilities, 1 - probabilities).astype(np.float64)
    losses: DoubleArray = -np.log(np.maximum(chosen, _SMALLEST)).sum(axis=1)
    return losses


def _judge(
    outputs: FloatArray, truth: FloatArray, loss: Loss
) -> tuple[DoubleArray, npt.NDArray[np.bool_]]:
    """Return each row's negative log-likelihood, and whether its answer is right in every label."""
    if isinstance(loss, Sigmoid):
        return label_losses(outputs, truth), ((outputs >= 0.5) == (truth >= 0.5)).all(axis=1)
    targets = truth.argmax(axis=1)
    chosen = outputs[np.arange(len(targets)), targets].astype(np.float64)
    return -np.log(np.maximum(chosen, _SMALLEST)), outputs.argmax(axis=1) == targets


def _without(fold_of: IntArray) -> list[Tensor]:
    """Return for each fold which rows are not of it."""
    return [torch.from_numpy(fold_of != fold) for fold in range(int(fold_of.max()) + 1)]


def _outputs(rows: Tensor, solution: Tensor, loss: Loss) -> Tensor:
    return loss.outputs(rows @ solution[:-1] + solution[-1])
