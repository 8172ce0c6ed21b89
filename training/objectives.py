"""What tuning strives for, task by task: the loss of a batch, heads, and what held-out rows say.

    task            loss of a row                    head                      likelihood of a row
    single_label    cross-entropy                    softmax regression        after a temperature
    ordinal         cross-entropy                    adjacent-category logits  after a temperature
    multi_label     of each label, added up          a logistic one each       after a temperature
    regression      half the squared error, of       ridge                     normal errors
                    standardised values

A head is trained in its *own terms* and served in those of the job (`serve`): values are trained
standardised, and the logits of classes that are adjusted for their shares are trained as they come.
A remedy for imbalance (training.imbalance) is thus in whatever is judged, frozen or tuned; and with
one every class weighs the same when rows judge, or the search would undo it: likelihoods of rows as
they come are higher without.

Not here: the fit that a frozen head ships by (training.fit, training.ridge), metrics of a report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from core.datasets import Task
from core.manifests import Interval
from core.preprocessing import FloatArray
from core.tasks import THRESHOLD, group_count
from training import imbalance, ridge
from training.calibration import cross_rescale
from training.convex import Ordered, Sigmoid, Softmax
from training.data import Targets, group
from training.fit import Head, IntArray, deal, fold_count, one_hot, path
from training.imbalance import Remedy
from training.multi_label import cross_calibrate
from training.strength import label_losses

DoubleArray = npt.NDArray[np.float64]
_SMALLEST = 1e-7


class Score(NamedTuple):
    """How right answers are: the share of rows, or of values how far off, and an interval."""

    accuracy: float | None = None
    rmse: float | None = None
    interval: Interval | None = None


class Objective(ABC):
    """What is strived for on a job's training rows, `targets`; `groups` [n] are rows alike.

    `has_classes` says that each row is of one class, so that rows may be mates.
    """

    task: ClassVar[Task]
    has_classes: ClassVar[bool] = False

    def __init__(self, targets: Targets, width: int, remedy: Remedy = "none") -> None:
        self.targets = targets
        self._width, self._remedy = width, remedy
        self.groups: IntArray = group(self.task, targets)
        self.group_count = group_count(self.task, width)

    def identity(self) -> tuple[Task, int, Remedy, Targets]:
        """Return what tells one objective from another."""
        return self.task, self._width, self._remedy, self.targets

    @abstractmethod
    def path(self, features: FloatArray, rows: IntArray) -> Iterator[tuple[float, Head]]:
        """Yield a head for each strength, strong to weak, in its own terms.

        It is fitted on features [m, dim] of the rows of these numbers, [m].
        """

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Return the mean loss of rows; `smoothing` is of labels, as far as there are any."""

    @abstractmethod
    def likelihoods(self, outputs: FloatArray, targets: Targets) -> DoubleArray:
        """Return what held-out rows say for a head that gave `outputs` for them, [n], in nats."""

    @abstractmethod
    def score(self, outputs: FloatArray, targets: Targets) -> Score:
        """Return how right `outputs` [n, width] are."""

    def serve(self, head: Head) -> Head:
        """Return a head of its own terms in those of the job."""
        return head

    def free(self, weight: FloatArray) -> FloatArray:
        """Return the numbers of a head's weight [dim, width] that training may change."""
        return weight

    def weight(self, free: Tensor) -> Tensor:
        """Return the weight [dim, width] of such numbers."""
        return free

    def fit_at(self, features: FloatArray, rows: IntArray, strength: float) -> Head:
        """Return the head of the path that has this strength."""
        return next(head for at, head in self.path(features, rows) if at == strength)


class Classes(Objective):
    """One class of several, with the remedy that the frozen head was found to need."""

    task = Task.SINGLE_LABEL
    has_classes = True

    def __init__(self, targets: Targets, width: int, remedy: Remedy = "none") -> None:
        super().__init__(targets, width, remedy)
        self._loss = Softmax(width)
        # A class without rows is asked for nowhere.
        self._class_weights = np.zeros(width, np.float32)
        self._class_weights[targets] = imbalance.row_weights(targets, width)

    def path(self, features: FloatArray, rows: IntArray) -> Iterator[tuple[float, Head]]:
        """Yield heads by softmax regression, of weighted rows if that is the remedy."""
        targets = self.targets[rows]
        weights = self._class_weights[targets] if self._remedy == "balanced_weights" else None
        return path(features, one_hot(targets, self._width), self._loss, weights=weights)

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Return the cross-entropy."""
        if self._remedy != "balanced_weights":
            return functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        # Not torch's `weight`, which divides by the weights of whatever rows a batch has.
        losses = functional.cross_entropy(
            logits, targets, label_smoothing=smoothing, reduction="none"
        )
        return (losses * torch.from_numpy(self._class_weights)[targets]).mean()

    def likelihoods(self, outputs: FloatArray, targets: Targets) -> DoubleArray:
        """Return log-likelihoods; with a remedy all classes weigh the same."""
        found = class_likelihoods(outputs, targets)
        return found if self._remedy == "none" else found * self._class_weights[targets]

    def score(self, outputs: FloatArray, targets: Targets) -> Score:
        """Return the accuracy."""
        return Score(accuracy=float((outputs.argmax(axis=1) == targets).mean()))

    def serve(self, head: Head) -> Head:
        """Return the head with adjusted logits, if that is the remedy."""
        if self._remedy != "logit_adjustment":
            return head
        return replace(head, bias=head.bias - imbalance.log_shares(self.targets, self._width))


class Ranks(Classes):
    """One class of several in order; a head has one direction, and so it is trained."""

    task = Task.ORDINAL

    def __init__(self, targets: Targets, width: int, _: Remedy = "none") -> None:
        super().__init__(targets, width)
        order = Ordered(width)
        self._loss, self._ranks = order, order.ranks

    def free(self, weight: FloatArray) -> FloatArray:
        """Return the direction, [dim]."""
        direction: FloatArray = weight @ self._ranks.numpy()
        return direction

    def weight(self, free: Tensor) -> Tensor:
        """Return the direction times the ranks."""
        return torch.outer(free, self._ranks)


class Labels(Objective):
    """Any of several labels."""

    task = Task.MULTI_LABEL

    def __init__(self, targets: Targets, width: int, _: Remedy = "none") -> None:
        super().__init__(targets, width)
        self._loss = Sigmoid(width)

    def path(self, features: FloatArray, rows: IntArray) -> Iterator[tuple[float, Head]]:
        """Yield heads of one logistic regression a label."""
        return path(features, torch.from_numpy(self.targets[rows]), self._loss, "sigmoid")

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Return the cross-entropy of all labels of a row together."""
        wanted = targets * (1 - smoothing) + smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return losses.sum(dim=1).mean()

    def likelihoods(self, outputs: FloatArray, targets: Targets) -> DoubleArray:
        """Return log-likelihoods of all labels of a row together."""
        return label_likelihoods(outputs, targets)

    def score(self, outputs: FloatArray, targets: Targets) -> Score:
        """Return the share of rows of which every label is right."""
        right = (outputs >= THRESHOLD) == (targets >= 0.5)
        return Score(accuracy=float(right.all(axis=1).mean()))


class Values(Objective):
    """A value; heads are of the standardised ones."""

    task = Task.REGRESSION

    def __init__(self, targets: Targets, width: int, _: Remedy = "none") -> None:
        super().__init__(targets, width)
        self._mean, self._deviation = float(targets.mean()), float(targets.std()) or 1.0

    def path(self, features: FloatArray, rows: IntArray) -> Iterator[tuple[float, Head]]:
        """Yield heads by ridge regression."""
        return ridge.path(features, (self.targets[rows] - self._mean) / self._deviation)

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Return half of the mean squared error."""
        del smoothing
        wanted = ((targets - self._mean) / self._deviation).to(logits.dtype)
        return 0.5 * functional.mse_loss(logits[:, 0], wanted)

    def likelihoods(self, outputs: FloatArray, targets: Targets) -> DoubleArray:
        """Return log-likelihoods under a normal distribution of the errors."""
        return value_likelihoods(outputs, targets)

    def score(self, outputs: FloatArray, targets: Targets) -> Score:
        """Return the root mean squared error, and the interval that the errors give."""
        errors = outputs[:, 0].astype(np.float64) - targets
        rmse = float(np.sqrt(np.square(errors).mean()))
        return Score(rmse=rmse, interval=ridge.conformal(errors))

    def serve(self, head: Head) -> Head:
        """Return the head of the values as they are."""
        deviation = np.float32(self._deviation)
        bias = (head.bias.astype(np.float64) * self._deviation + self._mean).astype(np.float32)
        return replace(head, weight=head.weight * deviation, bias=bias)


def class_likelihoods(probabilities: FloatArray, targets: IntArray) -> DoubleArray:
    """Return each row's log-likelihood, [n], after calibration across folds."""
    fold_of = deal(targets, fold_count(len(targets)), seed=0)
    calibrated, _ = cross_rescale(probabilities, targets, fold_of)
    chosen = calibrated[np.arange(len(targets)), targets].astype(np.float64)
    return np.log(np.maximum(chosen, _SMALLEST))


def label_likelihoods(probabilities: FloatArray, targets: FloatArray) -> DoubleArray:
    """Return each row's log-likelihood, [n], of all labels, after calibration across folds."""
    fold_of = deal(group(Task.MULTI_LABEL, targets), fold_count(len(targets)), seed=0)
    calibrated, _ = cross_calibrate(probabilities, targets, fold_of)
    return -label_losses(calibrated, targets)


def value_likelihoods(outputs: FloatArray, targets: DoubleArray) -> DoubleArray:
    """Return each row's log-likelihood, [n], but for a constant, with errors of their own size."""
    errors = outputs[:, 0].astype(np.float64) - targets
    return -ridge.row_losses(errors / (float(targets.std()) or 1.0))
