"""Features to head: multinomial logistic regression, its one hyper-parameter found by itself.

Frozen features and a linear classifier are the standard way to judge an encoder (Kornblith et al.
2019, arXiv 1805.08974) and hard to beat with few rows. The fit is convex: one optimum, no learning
rate, no epochs, and the same answer for the same seed. Rare classes are seen to in the end
(training.imbalance).

    centre and scale ──▶ path of L2 strengths × (k folds, all rows) ──▶ choose

*Scaling.* Features are centred and divided by one number, so that their mean squared length is 1,
and the loss is a mean over rows: one strength then means the same for unit vectors of text and for
unbounded image features, for 20 rows and for 10,000. Both are folded back into the head, which is a
plain affine map. (Dividing each feature by its own deviation was no better on text and worse on
images; docs/decisions.)

*Choosing.* Strengths go from strong to weak, each fit starting from the last (Friedman, Hastie &
Tibshirani 2010), and the path ends where nothing is gained. The log-likelihood of
held-out rows decides, not their accuracy, which is too coarse on a few rows: choosing by it cost up
to two points. Of strengths that are within one standard error of the best, the strongest is taken
(Breiman et al. 1984), the error being that of the row by row difference.

Not here: features (training.features), what the numbers say (training.evaluation).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel
from torch import Tensor

from core.errors import DataError
from core.preprocessing import FloatArray
from training import imbalance
from training.imbalance import Remedy, RemedyCandidate, Trial

STRENGTHS = tuple(float(10.0**exponent) for exponent in np.arange(0, -6.1, -0.5))
"""L2 strengths, strong to weak: `loss = mean(-log p) + strength / 2 · ‖W‖²`, without the bias."""

FOLDS = 5
FOLDS_OF_MANY_ROWS = 3
MANY_ROWS = 2000
_PATIENCE = 2
"""The path ends when as many weaker strengths have not been better than the one to be chosen."""

_NEGLIGIBLE = 0.01
"""Nats per row that are not worth a weaker penalty: on separable classes it never stops helping."""

_MAX_ITERATIONS = 200
_GRADIENT_TOLERANCE = 3e-5
_HISTORY = 10
_SMALLEST = 1e-7

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Head:
    """A linear classifier: `softmax(features @ weight + bias)`.

    `weight` is float32 [dim, classes], `bias` float32 [classes].
    """

    weight: FloatArray
    bias: FloatArray

    def predict(self, features: FloatArray) -> FloatArray:
        """Return probabilities, float32 [n, classes], of features, float32 [n, dim]."""
        weight, bias, rows = map(torch.from_numpy, (self.weight, self.bias, features))
        probabilities: FloatArray = torch.softmax(rows @ weight + bias, dim=1).numpy()
        return probabilities


class Candidate(BaseModel, frozen=True):
    """One strength that was tried, and how the rows held out fared: a line of the report."""

    strength: float
    accuracy: float
    nll: float


@dataclass(frozen=True)
class Fit:
    """A head fitted on all rows with `strength`.

    `out_of_fold` [n, classes] has for each row the probabilities of a head of the same strength
    that was fitted without it: what to judge the fit by when there are no other rows; `fold_of` [n]
    says which. `remedy` is against imbalance, `remedies` are those that were tried, if any.
    """

    head: Head
    strength: float
    folds: int
    candidates: tuple[Candidate, ...]
    out_of_fold: FloatArray
    fold_of: IntArray
    remedy: Remedy = "none"
    remedies: tuple[RemedyCandidate, ...] = ()


def fit(features: FloatArray, targets: IntArray, classes: int, *, seed: int) -> Fit:
    """Fit a head on features [n, dim] and class indices [n], n ≥ 2, each in `range(classes)`.

    A class with one row is held out like any other, and then no head can know it: it counts as an
    error, of about the same size at every strength. Raises `DataError` if a feature is not finite.
    """
    if not np.isfinite(features).all():
        raise DataError("the backbone gives numbers that are not finite for these rows")
    scaling = _Scaling.of(features)
    rows, truth = scaling.apply(features), torch.from_numpy(targets)
    folds = fold_count(len(targets))
    fold_of = torch.from_numpy(deal(targets, folds, seed))
    kept = [fold_of != fold for fold in range(folds)]
    paths = [_Path(rows[mask], truth[mask], classes) for mask in kept]
    # The fit on all rows goes along: what is chosen in the end has then been fitted already.
    paths.append(_Path(rows, truth, classes))

    candidates: list[Candidate] = []
    solutions: list[list[Tensor]] = []
    losses = np.empty((0, len(targets)))
    index = 0
    with single_threaded() as pool:
        for strength in STRENGTHS:
            solutions.append(list(pool.map(_Path.step, paths, [strength] * len(paths))))
            held_out = _held_out(rows, fold_of, solutions[-1])
            chosen = held_out[np.arange(len(targets)), targets].astype(np.float64)
            loss = -np.log(np.maximum(chosen, _SMALLEST))
            correct = held_out.argmax(axis=1) == targets
            candidates.append(
                Candidate(strength=strength, accuracy=float(correct.mean()), nll=float(loss.mean()))
            )
            losses = np.vstack([losses, loss])
            index = choose(losses)
            if len(losses) - 1 - index >= _PATIENCE:
                break
        plain = Fit(
            head=scaling.head(solutions[index][-1]),
            strength=STRENGTHS[index],
            folds=folds,
            candidates=tuple(candidates),
            out_of_fold=_held_out(rows, fold_of, solutions[index]),
            fold_of=fold_of.numpy(),
        )
        if not imbalance.is_imbalanced(targets):
            return plain
        weights = imbalance.row_weights(targets, classes)
        for path, mask in zip(paths, [*kept, fold_of >= 0], strict=True):
            path.weigh(torch.from_numpy(weights)[mask])
        weighted = list(pool.map(_Path.step, paths, [plain.strength] * len(paths)))
    shares = imbalance.log_shares(targets, classes)
    trials = [
        Trial("none", plain.out_of_fold),
        Trial("balanced_weights", _held_out(rows, fold_of, weighted)),
        Trial("logit_adjustment", imbalance.adjust(plain.out_of_fold, shares)),
    ]
    heads = [
        plain.head,
        scaling.head(weighted[-1]),
        replace(plain.head, bias=plain.head.bias - shares),
    ]
    taken, tried = imbalance.choose_remedy(trials, targets, seed)
    return replace(
        plain,
        head=heads[taken],
        out_of_fold=trials[taken].out_of_fold,
        remedy=trials[taken].remedy,
        remedies=tried,
    )


def fit_once(
    features: FloatArray, targets: IntArray, classes: int, strength: float, remedy: Remedy
) -> Head:
    """Fit a head at a given strength and remedy, without cross-validation, on this thread."""
    scaling = _Scaling.of(features)
    path = _Path(scaling.apply(features), torch.from_numpy(targets), classes)
    if remedy == "balanced_weights":
        path.weigh(torch.from_numpy(imbalance.row_weights(targets, classes)))
    head = scaling.head(path.step(strength))
    if remedy == "logit_adjustment":
        return replace(head, bias=head.bias - imbalance.log_shares(targets, classes))
    return head


@dataclass(frozen=True)
class Judged:
    """A head fitted on some rows, with the strength that other rows chose.

    `probabilities` [n, classes] are of those others.
    """

    head: Head
    strength: float
    probabilities: FloatArray


def fit_apart(
    features: FloatArray, targets: IntArray, held_out: FloatArray, truth: IntArray, classes: int
) -> Judged:
    """Fit on features [n, dim] the head whose strength suits `held_out` rows [m, dim] best.

    For features that were trained on the fitted rows: these then look better than they are, and a
    cross-validation among them would choose too weak a strength.
    """
    scaling = _Scaling.of(features)
    path = _Path(scaling.apply(features), torch.from_numpy(targets), classes)
    heads: list[Head] = []
    losses = np.empty((0, len(truth)))
    with single_threaded():
        for strength in STRENGTHS:
            heads.append(scaling.head(path.step(strength)))
            chosen = heads[-1].predict(held_out)[np.arange(len(truth)), truth].astype(np.float64)
            losses = np.vstack([losses, -np.log(np.maximum(chosen, _SMALLEST))])
            index = choose(losses)
            if len(losses) - 1 - index >= _PATIENCE:
                break
    return Judged(heads[index], STRENGTHS[index], heads[index].predict(held_out))


def fit_at(features: FloatArray, targets: IntArray, classes: int, strength: float) -> Head:
    """Fit a head of one of `STRENGTHS`, by the path from the strongest that all heads come by."""
    scaling = _Scaling.of(features)
    path = _Path(scaling.apply(features), torch.from_numpy(targets), classes)
    with single_threaded():
        for stronger in STRENGTHS[: STRENGTHS.index(strength) + 1]:
            solution = path.step(stronger)
    return scaling.head(solution)


def choose(losses: npt.NDArray[np.float64]) -> int:
    """Return which of the strengths, strong to weak, to take; `losses` is [strengths, rows].

    The first whose mean loss is within one standard error of the lowest, or negligibly above it.
    """
    excess = losses - losses[losses.mean(axis=1).argmin()]
    error = excess.std(axis=1) / np.sqrt(losses.shape[1])
    return int(np.flatnonzero(excess.mean(axis=1) <= np.maximum(error, _NEGLIGIBLE))[0])


def fold_count(rows: int) -> int:
    """Return how many folds to cut so many rows into: fewer where a fold is telling enough."""
    return FOLDS_OF_MANY_ROWS if rows > MANY_ROWS else max(2, min(FOLDS, rows // 2))


def deal(targets: IntArray, folds: int, seed: int) -> IntArray:
    """Return the fold of each row, [n]: every class, shuffled, is dealt to the folds in turn."""
    numbers = np.random.default_rng(seed)
    shuffled = numbers.permutation(len(targets))
    order = shuffled[np.argsort(targets[shuffled], kind="stable")]
    fold_of = np.empty(len(targets), np.int64)
    fold_of[order] = np.arange(len(targets)) % folds
    return fold_of


@dataclass(frozen=True)
class _Scaling:
    """Centre, and one divisor for all features."""

    mean: npt.NDArray[np.float64]
    divisor: float

    @classmethod
    def of(cls, features: FloatArray) -> _Scaling:
        mean = features.mean(axis=0, dtype=np.float64)
        length = float(np.sqrt(np.square(features - mean).sum(axis=1).mean()))
        return cls(mean, length or 1.0)

    def apply(self, features: FloatArray) -> Tensor:
        return torch.from_numpy(((features - self.mean) / self.divisor).astype(np.float32))

    def head(self, solution: Tensor) -> Head:
        """Return a head on unscaled features that is the same as `solution` on scaled ones."""
        values = solution.double().numpy()
        weight = values[:-1] / self.divisor
        bias = values[-1] - self.mean @ weight
        return Head(weight.astype(np.float32), bias.astype(np.float32))


@contextmanager
def single_threaded() -> Iterator[ThreadPoolExecutor]:
    """Give as many workers as torch has threads, each of which computes on one thread.

    The products here are small: split between threads that wait for each other, they take ten times
    as long on a busy machine, and the sums come out in another order for another number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            threads, "fit", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


class _Path:
    """The optimum on one set of rows as the strength falls; each step starts from the last."""

    def __init__(self, rows: Tensor, truth: Tensor, classes: int) -> None:
        self._rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        self._truth = torch.nn.functional.one_hot(truth, classes).to(rows.dtype)
        self._weights = torch.full((len(rows), 1), 1 / len(rows))
        self._solution = torch.zeros(self._rows.shape[1], classes)

    def weigh(self, weights: Tensor) -> None:
        """Let rows count as `weights` [n] say, from the next step on."""
        self._weights = (weights / weights.sum()).unsqueeze(1)

    def step(self, strength: float) -> Tensor:
        """Return weight and, as the last row, bias [dim + 1, classes] for this strength.

        L-BFGS (Liu & Nocedal 1989) with a strong Wolfe search. The gradient is written out: it is
        two matrix products, and automatic differentiation takes twice as long on small ones.
        """
        solution = self._solution.clone().requires_grad_(True)
        penalty = torch.full((self._rows.shape[1], 1), strength)
        penalty[-1] = 0.0

        def closure() -> Tensor:
            with torch.no_grad():
                logarithms = torch.log_softmax(self._rows @ solution, dim=1)
                likelihood = (logarithms * self._truth * self._weights).sum()
                residual = logarithms.exp_().sub_(self._truth).mul_(self._weights)
                solution.grad = self._rows.T @ residual + penalty * solution
                return 0.5 * (penalty * solution.square()).sum() - likelihood

        optimiser: Any = torch.optim.LBFGS(
            [solution],
            max_iter=_MAX_ITERATIONS,
            history_size=_HISTORY,
            tolerance_grad=_GRADIENT_TOLERANCE,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        optimiser.step(closure)
        self._solution = solution.detach()
        return self._solution


def _held_out(rows: Tensor, fold_of: Tensor, solutions: list[Tensor]) -> FloatArray:
    """Return each row's probabilities by the fold that left it out; the last one left none."""
    probabilities = torch.empty(len(rows), solutions[0].shape[1])
    for fold, solution in enumerate(solutions[:-1]):
        mine = fold_of == fold
        probabilities[mine] = torch.softmax(rows[mine] @ solution[:-1] + solution[-1], dim=1)
    array: FloatArray = probabilities.numpy()
    return array
