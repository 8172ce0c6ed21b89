"""Features to head: logistic regression, its one hyper-parameter found by itself.

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

Not here: features (training.features), one step of a path (training.convex), values
(training.ridge), what the numbers say (training.evaluation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel
from torch import Tensor

from core.errors import DataError
from core.preprocessing import FloatArray
from core.tasks import Output
from training import imbalance
from training.convex import Loss, Ordered, Path, Scaling, Sigmoid, Softmax, single_threaded
from training.imbalance import Remedy, RemedyCandidate, Trial

STRENGTHS = tuple(float(10.0**exponent) for exponent in np.arange(0, -6.1, -0.5))
"""L2 strengths, strong to weak: `loss = mean(-log p) + strength / 2 · ‖W‖²`, without the bias."""

FOLDS = 5
FOLDS_OF_MANY_ROWS = 3
MANY_ROWS = 2000
PATIENCE = 2
"""The path ends when as many weaker strengths have not been better than the one to be chosen."""

_NEGLIGIBLE = 0.01
"""Nats per row that are not worth a weaker penalty: on separable classes it never stops helping."""

_SMALLEST = 1e-7

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Head:
    """A linear model: `output(features @ weight + bias)`.

    `weight` is float32 [dim, width], `bias` float32 [width].
    """

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


class Candidate(BaseModel, frozen=True):
    """One strength that was tried, and how the rows held out fared: a line of the report.

    Values have no `accuracy` but a root mean squared error.
    """

    strength: float
    accuracy: float | None = None
    nll: float
    rmse: float | None = None


@dataclass(frozen=True)
class Fit:
    """A head fitted on all rows with `strength`.

    `out_of_fold` [n, width] has for each row what a head of the same strength gives that was fitted
    without it: what to judge the fit by when there are no other rows; `fold_of` [n] says which.
    `remedy` is against imbalance, `remedies` are those that were tried, if any. The classes of an
    `is_ordered` fit are in order.
    """

    head: Head
    strength: float
    folds: int
    candidates: tuple[Candidate, ...]
    out_of_fold: FloatArray
    fold_of: IntArray
    remedy: Remedy = "none"
    remedies: tuple[RemedyCandidate, ...] = ()
    is_ordered: bool = False


@dataclass(frozen=True)
class _Search:
    """A path of fits on all folds, and what was chosen of it."""

    rows: Tensor
    scaling: Scaling
    loss: Loss
    fold_of: IntArray
    paths: list[Path]
    solutions: list[Tensor]
    chosen: Fit

    def held_out(self, solutions: list[Tensor]) -> FloatArray:
        """Return what the heads give for the rows that they were fitted without."""
        return _held_out(self.rows, self.fold_of, solutions, self.loss)


def fit(features: FloatArray, targets: IntArray, classes: int, *, seed: int) -> Fit:
    """Fit a head on features [n, dim] and class indices [n], n ≥ 2, each in `range(classes)`.

    A class with one row is held out like any other, and then no head can know it: it counts as an
    error, of about the same size at every strength. Raises `DataError` if a feature is not finite.
    """
    fold_of = deal(targets, fold_count(len(targets)), seed)
    search = _search(features, _one_hot(targets, classes), fold_of, Softmax(classes))
    plain = search.chosen
    if not imbalance.is_imbalanced(targets):
        return plain
    weights = imbalance.row_weights(targets, classes)
    masks = [fold_of != fold for fold in range(plain.folds)]
    with single_threaded() as pool:
        for path, mask in zip(search.paths, [*masks, fold_of >= 0], strict=True):
            path.weigh(torch.from_numpy(weights[mask]))
        weighted = list(pool.map(Path.step, search.paths, [plain.strength] * len(search.paths)))
    shares = imbalance.log_shares(targets, classes)
    trials = [
        Trial("none", plain.out_of_fold),
        Trial("balanced_weights", search.held_out(weighted)),
        Trial("logit_adjustment", imbalance.adjust(plain.out_of_fold, shares)),
    ]
    heads = [
        plain.head,
        Head(*search.scaling.unscaled(weighted[-1])),
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


def fit_ordered(features: FloatArray, targets: IntArray, classes: int, *, seed: int) -> Fit:
    """Fit a head as `fit` does, for classes whose indices are their order (training.convex)."""
    fold_of = deal(targets, fold_count(len(targets)), seed)
    search = _search(features, _one_hot(targets, classes), fold_of, Ordered(classes))
    return replace(search.chosen, is_ordered=True)


def fit_labels(features: FloatArray, targets: FloatArray, groups: IntArray, *, seed: int) -> Fit:
    """Fit a logistic regression for each label, of one strength, on targets 0 or 1 [n, labels].

    Rows of the same of `groups` [n] are dealt to the folds in turn. Raises `DataError` as `fit`.
    """
    fold_of = deal(groups, fold_count(len(groups)), seed)
    return _search(features, torch.from_numpy(targets), fold_of, Sigmoid(targets.shape[1])).chosen


def _search(features: FloatArray, truth: Tensor, fold_of: IntArray, loss: Loss) -> _Search:
    if not np.isfinite(features).all():
        raise DataError("the backbone gives numbers that are not finite for these rows")
    scaling = Scaling.of(features)
    rows = scaling.apply(features)
    folds = int(fold_of.max()) + 1
    kept = [torch.from_numpy(fold_of != fold) for fold in range(folds)]
    paths = [Path(rows[mask], truth[mask], loss) for mask in kept]
    # The fit on all rows goes along: what is chosen in the end has then been fitted already.
    paths.append(Path(rows, truth, loss))
    candidates: list[Candidate] = []
    solutions: list[list[Tensor]] = []
    losses = np.empty((0, len(rows)))
    index = 0
    with single_threaded() as pool:
        for strength in STRENGTHS:
            solutions.append(list(pool.map(Path.step, paths, [strength] * len(paths))))
            held_out = _held_out(rows, fold_of, solutions[-1], loss)
            lost, correct = _judge(held_out, truth.numpy(), loss)
            candidates.append(
                Candidate(strength=strength, accuracy=float(correct.mean()), nll=float(lost.mean()))
            )
            losses = np.vstack([losses, lost])
            index = choose(losses)
            if len(losses) - 1 - index >= PATIENCE:
                break
    output: Output = "sigmoid" if isinstance(loss, Sigmoid) else "softmax"
    fitted = Fit(
        head=Head(*scaling.unscaled(solutions[index][-1]), output),
        strength=STRENGTHS[index],
        folds=folds,
        candidates=tuple(candidates),
        out_of_fold=_held_out(rows, fold_of, solutions[index], loss),
        fold_of=fold_of,
    )
    return _Search(rows, scaling, loss, fold_of, paths, solutions[index], fitted)


def _judge(
    outputs: FloatArray, truth: FloatArray, loss: Loss
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return each row's negative log-likelihood, and whether its answer is right in every label."""
    if isinstance(loss, Sigmoid):
        return label_losses(outputs, truth), ((outputs >= 0.5) == (truth >= 0.5)).all(axis=1)
    targets = truth.argmax(axis=1)
    chosen = outputs[np.arange(len(targets)), targets].astype(np.float64)
    return -np.log(np.maximum(chosen, _SMALLEST)), outputs.argmax(axis=1) == targets


def label_losses(probabilities: FloatArray, targets: FloatArray) -> npt.NDArray[np.float64]:
    """Return each row's negative log-likelihood [n], the sum over its labels, in nats."""
    chosen = np.where(targets >= 0.5, probabilities, 1 - probabilities).astype(np.float64)
    losses: npt.NDArray[np.float64] = -np.log(np.maximum(chosen, _SMALLEST)).sum(axis=1)
    return losses


def fit_once(
    features: FloatArray, targets: IntArray, classes: int, strength: float, remedy: Remedy,
    *, is_ordered: bool = False,
) -> Head:  # fmt: skip
    """Fit a head at a given strength and remedy, without cross-validation, on this thread."""
    scaling = Scaling.of(features)
    loss = Ordered(classes) if is_ordered else Softmax(classes)
    path = Path(scaling.apply(features), _one_hot(targets, classes), loss)
    if remedy == "balanced_weights":
        path.weigh(torch.from_numpy(imbalance.row_weights(targets, classes)))
    head = Head(*scaling.unscaled(path.step(strength)))
    if remedy == "logit_adjustment":
        return replace(head, bias=head.bias - imbalance.log_shares(targets, classes))
    return head


def path(features: FloatArray, targets: IntArray, classes: int) -> Iterator[tuple[float, Head]]:
    """Yield a head for each of `STRENGTHS`, strong to weak, each fit starting from the last."""
    scaling = Scaling.of(features)
    steps = Path(scaling.apply(features), _one_hot(targets, classes), Softmax(classes))
    for strength in STRENGTHS:
        with single_threaded():
            head = Head(*scaling.unscaled(steps.step(strength)))
        yield strength, head


def fit_at(features: FloatArray, targets: IntArray, classes: int, strength: float) -> Head:
    """Fit a head of one of `STRENGTHS`, by the path from the strongest that all heads come by."""
    return next(head for at, head in path(features, targets, classes) if at == strength)


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


def _one_hot(targets: IntArray, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(targets), classes).float()


def _held_out(rows: Tensor, fold_of: IntArray, solutions: list[Tensor], loss: Loss) -> FloatArray:
    """Return each row's probabilities by the fold that left it out; the last one left none."""
    probabilities = torch.empty(len(rows), solutions[0].shape[1])
    for fold, solution in enumerate(solutions[:-1]):
        mine = torch.from_numpy(fold_of == fold)
        probabilities[mine] = loss.outputs(rows[mine] @ solution[:-1] + solution[-1])
    array: FloatArray = probabilities.numpy()
    return array
