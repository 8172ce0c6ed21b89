"""Features to head: logistic regression, its one hyper-parameter found by itself.

Frozen features and a linear classifier are the standard way to judge an encoder (Kornblith et al.
2019, arXiv 1805.08974) and hard to beat with few rows. The fit is convex: one optimum, no learning
rate, no epochs, and the same answer for the same seed. Rare classes are seen to in the end
(training.imbalance).

    centre, scale and turn ──▶ path of L2 strengths × folds ──▶ choose ──▶ all rows, at that one

Rows that repeat each other are in one fold: a head that was fitted on a row's twin would answer it
from memory, and the accuracy that is quoted would be of copies.

Not here: features (training.features), how the strength is found (training.strength), one step of a
path (training.convex), values (training.ridge), what the numbers say (training.evaluation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict
from torch import Tensor

from core.preprocessing import FloatArray
from core.tasks import Output
from training import imbalance
from training.convex import Loss, Ordered, Path, Sigmoid, Softmax, single_threaded
from training.imbalance import Remedy, RemedyCandidate, Trial
from training.scaling import Axes
from training.strength import STRENGTHS, Candidate, Search, search

FOLDS = 5
FOLDS_OF_MANY_ROWS = 3
MANY_ROWS = 2000
"""Above it a fold is telling enough for fewer of them, and for one alone to find the strength."""

IntArray = npt.NDArray[np.int64]

_ARRAYS = ConfigDict(arbitrary_types_allowed=True)
"""For a fit that is kept (training.result_cache)."""


@dataclass(frozen=True)
class Head:
    """A linear model: `output(features @ weight + bias)`.

    `weight` is float32 [dim, width], `bias` float32 [width].
    """

    __pydantic_config__ = _ARRAYS

    weight: FloatArray
    bias: FloatArray
    output: Output = "softmax"

    def predict(self, features: FloatArray) -> FloatArray:
        """Return probabilities or values, float32 [n, width], of features, float32 [n, dim]."""
        weight, bias, rows = map(torch.from_numpy, (self.weight, self.bias, features))
        logits = rows @ weight + bias
        if self.output == "softmax":
            logits = torch.softmax(logits, dim=1)
        elif self.output == "sigmoid":
            logits = torch.sigmoid(logits)
        outputs: FloatArray = logits.numpy()
        return outputs


@dataclass(frozen=True)
class Fit:
    """A head fitted on all rows with `strength`.

    `out_of_fold` [n, width] has for each row what a head of the same strength gives that was fitted
    without it: what to judge the fit by when there are no other rows; `fold_of` [n] says which.
    `remedy` is against imbalance, `remedies` are those that were tried, if any. The classes of an
    `is_ordered` fit are in order.
    """

    __pydantic_config__ = _ARRAYS

    head: Head
    strength: float
    folds: int
    candidates: tuple[Candidate, ...]
    out_of_fold: FloatArray
    fold_of: IntArray
    remedy: Remedy = "none"
    remedies: tuple[RemedyCandidate, ...] = ()
    is_ordered: bool = False


def fit(
    features: FloatArray, targets: IntArray, classes: int, *, seed: int,
    twins: IntArray | None = None,
) -> Fit:  # fmt: skip
    """Fit a head on features [n, dim] and class indices [n], n ≥ 2, each in `range(classes)`.

    Rows of the same of `twins` [n] are held out together (`deal`). A class with one row is held
    out like any other, and then no head can know it: it counts as an error, of about the same size
    at every strength. Raises `DataError` if a feature is not finite.
    """
    found = search(
        features, one_hot(targets, classes), deal(targets, fold_count(len(targets)), seed, twins),
        Softmax(classes), judges=_judges(len(targets)),
    )  # fmt: skip
    plain = _fitted(found)
    if not imbalance.is_imbalanced(targets):
        return plain
    weighted = found.refit(imbalance.row_weights(targets, classes))
    shares = imbalance.log_shares(targets, classes)
    trials = [
        Trial("none", plain.out_of_fold),
        Trial("balanced_weights", found.held_out(weighted)),
        Trial("logit_adjustment", imbalance.adjust(plain.out_of_fold, shares)),
    ]
    heads = [
        plain.head,
        Head(*found.axes.unscaled(weighted[-1])),
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


def fit_ordered(
    features: FloatArray, targets: IntArray, classes: int, *, seed: int,
    twins: IntArray | None = None,
) -> Fit:  # fmt: skip
    """Fit a head as `fit` does, for classes whose indices are their order (training.convex)."""
    found = search(
        features, one_hot(targets, classes), deal(targets, fold_count(len(targets)), seed, twins),
        Ordered(classes), judges=_judges(len(targets)),
    )  # fmt: skip
    return replace(_fitted(found), is_ordered=True)


def fit_labels(
    features: FloatArray, targets: FloatArray, groups: IntArray, *, seed: int,
    twins: IntArray | None = None,
) -> Fit:  # fmt: skip
    """Fit a logistic regression for each label, of one strength, on targets 0 or 1 [n, labels].

    Rows of the same of `groups` [n] are dealt to the folds in turn. Raises `DataError` as `fit`.
    """
    found = search(
        features, torch.from_numpy(targets), deal(groups, fold_count(len(groups)), seed, twins),
        Sigmoid(targets.shape[1]), judges=_judges(len(groups)),
    )  # fmt: skip
    return _fitted(found, "sigmoid")


def _judges(rows: int) -> int | None:
    return 1 if rows > MANY_ROWS else None


def _fitted(found: Search, output: Output = "softmax") -> Fit:
    return Fit(
        head=Head(*found.axes.unscaled(found.solutions[-1]), output),
        strength=found.strength,
        folds=len(found.solutions) - 1,
        candidates=found.candidates,
        out_of_fold=found.held_out(found.solutions),
        fold_of=found.fold_of,
    )


def fit_once(
    features: FloatArray, targets: IntArray, classes: int, strength: float, remedy: Remedy,
    *, is_ordered: bool = False,
) -> Head:  # fmt: skip
    """Fit a head at a given strength and remedy, without cross-validation, on this thread."""
    loss = Ordered(classes) if is_ordered else Softmax(classes)
    axes, path = _start(features, one_hot(targets, classes), loss)
    if remedy == "balanced_weights":
        path.weigh(torch.from_numpy(imbalance.row_weights(targets, classes)))
    head = Head(*axes.unscaled(path.step(strength)))
    if remedy == "logit_adjustment":
        return replace(head, bias=head.bias - imbalance.log_shares(targets, classes))
    return head


def path(
    features: FloatArray, truth: Tensor, loss: Loss, output: Output = "softmax",
    weights: FloatArray | None = None,
) -> Iterator[tuple[float, Head]]:  # fmt: skip
    """Yield a head for each of `STRENGTHS`, strong to weak, each fit starting from the last.

    Features are [n, dim], `truth` is [n, width], and rows count as `weights` [n] say.
    """
    with single_threaded():
        axes, steps = _start(features, truth, loss)
    if weights is not None:
        steps.weigh(torch.from_numpy(weights))
    for strength in STRENGTHS:
        with single_threaded():
            head = Head(*axes.unscaled(steps.step(strength)), output)
        yield strength, head


def _start(features: FloatArray, truth: Tensor, loss: Loss) -> tuple[Axes, Path]:
    axes = Axes.of(features)
    return axes, Path(axes.apply(features), truth, loss, axes.variances)


def fold_count(rows: int) -> int:
    """Return how many folds to cut so many rows into: fewer where a fold is telling enough."""
    return FOLDS_OF_MANY_ROWS if rows > MANY_ROWS else max(2, min(FOLDS, rows // 2))


def deal(targets: IntArray, folds: int, seed: int, twins: IntArray | None = None) -> IntArray:
    """Return the fold of each row, [n]: every class, shuffled, is dealt to the folds in turn.

    Rows of one of `twins` [n] go together, with the first of them, the largest groups of a class
    first. There are fewer folds if there are fewer groups. A single group is dealt row by row,
    since rows that are all alike tell nothing in whatever folds.
    """
    rows = np.arange(len(targets)) if twins is None else twins
    _, leaders, group_of, sizes = np.unique(
        rows, return_index=True, return_inverse=True, return_counts=True
    )
    if len(leaders) == 1:
        return deal(targets, folds, seed)
    numbers = np.random.default_rng(seed)
    shuffled = numbers.permutation(len(leaders))
    order = shuffled[np.lexsort((-sizes[shuffled], targets[leaders[shuffled]]))]
    fold_of = np.empty(len(leaders), np.int64)
    fold_of[order] = np.arange(len(leaders)) % folds
    return fold_of[group_of]


def one_hot(targets: IntArray, classes: int) -> Tensor:
    """Return 1 where a row is of a class, float32 [n, classes]."""
    return torch.nn.functional.one_hot(torch.from_numpy(targets), classes).float()
