"""Linear models with a convex loss, for a whole path of L2 strengths.

    softmax    one class of several          multinomial logistic regression
    sigmoid    any of several labels         a logistic regression for each
    ordered    one class of several in order adjacent-category logits (Agresti 2010, section 4.1)

`ordered` is a softmax whose weights are one direction times the classes' ranks: the odds of a class
against the one below it depend on the features in the same way all along the scale, so it has as
many weights as a regression, and yet its head is affine like any other. Ranks are centred and of
length 1, so that a strength means about the same for any number of classes.

How hard L-BFGS has to work depends on how much more the loss bends one way than another. In the
axes of the rows' variance (training.scaling) that is known well enough beforehand, and weights are
measured so that it bends about as much in all of them: a third of the passes over the rows for the
same closeness (docs/decisions/0008).

Not here: how a strength is chosen (training.strength).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

_MAX_ITERATIONS = 200
_GRADIENT_TOLERANCE = 3e-4
_HISTORY = 10
_SMALLEST_CURVATURE = 1e-5


class Loss(Protocol):
    """What a model's logits are worth, and which of its numbers are free."""

    def start(self, dim: int) -> Tensor:
        """Return free numbers of zero for features of width `dim`."""

    def penalised(self, dim: int) -> Tensor:
        """Return 1 where a free number is a weight and 0 where it is a bias, broadcastable."""

    def expand(self, free: Tensor) -> Tensor:
        """Return weight and, as the last row, bias [dim + 1, width]."""

    def gather(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the free numbers from that of what they expand to."""

    def judge(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-likelihoods, whose sum counts, and minus their gradient; both [n, width]."""

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the probabilities, [n, width]."""


class Softmax:
    """One class of `width`; truth is one-hot."""

    def __init__(self, width: int) -> None:
        self._width = width

    def start(self, dim: int) -> Tensor:
        """Return all weights and biases."""
        return torch.zeros(dim + 1, self._width)

    def penalised(self, dim: int) -> Tensor:
        """Return a column that leaves out the last row."""
        mask = torch.ones(dim + 1, 1)
        mask[-1] = 0.0
        return mask

    def expand(self, free: Tensor) -> Tensor:
        """Every number is free."""
        return free

    def gather(self, gradient: Tensor) -> Tensor:
        """Every number is free."""
        return gradient

    def judge(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the true class' probability, beside zeros."""
        logarithms = torch.log_softmax(logits, dim=1)
        likelihoods = logarithms * truth
        return likelihoods, logarithms.exp_().sub_(truth)

    def outputs(self, logits: Tensor) -> Tensor:
        """Return probabilities that add up to 1."""
        return torch.softmax(logits, dim=1)


class Sigmoid(Softmax):
    """Any of `width` labels; truth is 0 or 1 for each."""

    def judge(self, logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Return each label's log-likelihood."""
        likelihoods = truth * logits - torch.nn.functional.softplus(logits)
        return likelihoods, torch.sigmoid(logits).sub_(truth)

    def outputs(self, logits: Tensor) -> Tensor:
        """Return a probability for each label by itself."""
        return torch.sigmoid(logits)


class Ordered(Softmax):
    """One class of `width` in order; free are one weight per feature, and the biases."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        ranks = torch.arange(width, dtype=torch.float32)
        ranks -= ranks.mean()
        self.ranks = ranks / ranks.norm()

    def start(self, dim: int) -> Tensor:
        """Return the direction, then the biases, [dim + width]."""
        return torch.zeros(dim + self._width)

    def penalised(self, dim: int) -> Tensor:
        """Return 1 for the direction."""
        return torch.cat([torch.ones(dim), torch.zeros(self._width)])

    def expand(self, free: Tensor) -> Tensor:
        """Return the direction times the ranks."""
        direction, bias = free[: -self._width], free[-self._width :]
        return torch.cat([torch.outer(direction, self.ranks), bias.unsqueeze(0)])

    def gather(self, gradient: Tensor) -> Tensor:
        """Return the gradient along the ranks."""
        return torch.cat([gradient[:-1] @ self.ranks, gradient[-1]])


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


class Path:
    """The optimum on one set of rows as the strength falls; each step starts from the last.

    `rows` [n, rank] are along axes in which all rows vary by `variances` [rank].
    """

    def __init__(self, rows: Tensor, truth: Tensor, loss: Loss, variances: Tensor) -> None:
        self._rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        self._truth = truth
        self._loss = loss
        self._weights = torch.full((len(rows), 1), 1 / len(rows))
        self._free = loss.start(rows.shape[1])
        self._penalised = loss.penalised(rows.shape[1])
        spread = torch.ones(len(self._penalised))
        spread[: len(variances)] = variances
        self._spread = spread.view_as(self._penalised)

    def weigh(self, weights: Tensor) -> None:
        """Let rows count as `weights` [n] say, from the next step on."""
        self._weights = (weights / weights.sum()).unsqueeze(1)

    def step(self, strength: float) -> Tensor:
        """Return weight and, as the last row, bias [rank + 1, width] for this strength.

        L-BFGS (Liu & Nocedal 1989) with a strong Wolfe search. The gradient is written out: it is
        two matrix products, and automatic differentiation takes twice as long on small ones.
        """
        penalty = strength * self._penalised
        unit = (self._curvature() * self._spread + penalty).rsqrt()
        steps = (self._free / unit).requires_grad_(True)

        def closure() -> Tensor:
            with torch.no_grad():
                free = unit * steps
                logits = self._rows @ self._loss.expand(free)
                likelihoods, residual = self._loss.judge(logits, self._truth)
                gradient = self._rows.T @ residual.mul_(self._weights)
                steps.grad = unit * (self._loss.gather(gradient) + penalty * free)
                return 0.5 * (penalty * free.square()).sum() - (likelihoods * self._weights).sum()

        optimiser: Any = torch.optim.LBFGS(
            [steps],
            max_iter=_MAX_ITERATIONS,
            history_size=_HISTORY,
            tolerance_grad=_GRADIENT_TOLERANCE,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        optimiser.step(closure)
        self._free = unit * steps.detach()
        return self._loss.expand(self._free)

    def _curvature(self) -> float:
        """How much the mean loss bends with a logit, here and on average."""
        outputs = self._loss.outputs(self._rows @ self._loss.expand(self._free))
        return max(float((outputs * (1 - outputs)).mean()), _SMALLEST_CURVATURE)
