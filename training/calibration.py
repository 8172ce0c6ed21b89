"""Do the probabilities mean what they say? One temperature mends most of it (Guo et al. 2017).

`softmax(logits / T)` leaves every decision as it is and moves confidence only. T minimises the
negative log-likelihood of rows that the head was not fitted on: a convex search in `1 / T`. That n
such rows are all answered rightly does not say that the next will be, so each counts as sure to
(n + 1) / (n + 2) only, after Platt (1999); or a few separable rows would make the head as sure as
can be. Since a head is affine, T is folded into it by dividing weight and bias, so `head.onnx`
stays one `Gemm` and one `Softmax`, and serving knows nothing of it.

What is reported as "after" is honest too: the rows are dealt to folds, and each is scaled with the
temperature that was fitted on the other folds.

The expected calibration error (ECE) is over 15 bins of equal width, as in most of the literature,
so figures can be compared. On a few hundred rows it is biased upwards: a bin of 20 rows strays by
chance alone. Not here: accuracy and likelihood (training.evaluation).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from core.preprocessing import FloatArray
from training.fit import Head, IntArray

BINS = 15
LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures outside are never taken."""

_STEPS = 40
_SMALLEST = 1e-7
_GOLDEN_RATIO = (np.sqrt(5) - 1) / 2


class Bin(BaseModel, frozen=True):
    """The rows whose confidence is in one of the bins: how many, how sure, and how often right."""

    rows: int
    confidence: float
    accuracy: float


class Quality(BaseModel, frozen=True):
    """How good probabilities are: expected calibration error, and nats per row."""

    ece: float
    nll: float


class Calibration(BaseModel, frozen=True):
    """The temperature in the head, and the same rows before and after; `bins` are after."""

    temperature: float
    before: Quality
    after: Quality
    bins: tuple[Bin, ...]

    def summary(self) -> dict[str, float]:
        """Return the figures of a manifest."""
        return {
            "ece": self.after.ece,
            "ece_before": self.before.ece,
            "nll_before": self.before.nll,
            "temperature": self.temperature,
        }


def fit_temperature(probabilities: FloatArray, targets: IntArray) -> float:
    """Return the temperature under which held-out `probabilities` [n, classes] fit best.

    The likelihood is unimodal in `log T`, which golden sections search to within 0.1 %.
    """
    logits = _logits(probabilities)
    count, classes = logits.shape
    sure = (count + 1) / (count + 2)
    true = logits[np.arange(count), targets]
    others = (logits.sum(axis=1) - true) / max(classes - 1, 1)
    wanted = float((sure * true + (1 - sure) * others).mean())

    def loss(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        scaled = logits * inverse
        top = scaled.max(axis=1)
        normaliser = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float(normaliser.mean() - inverse * wanted)

    low, high = float(np.log(LOWEST)), float(np.log(HIGHEST))
    left, right = high - _GOLDEN_RATIO * (high - low), low + _GOLDEN_RATIO * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    for _ in range(_STEPS):
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - _GOLDEN_RATIO * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + _GOLDEN_RATIO * (high - low)
            loss_right = loss(right)
        if high - low < 1e-3:
            break
    return float(np.exp((low + high) / 2))


def rescale(probabilities: FloatArray, temperature: float) -> FloatArray:
    """Return `softmax(log p / T)`: what the head gives once T is folded into it."""
    scaled = _logits(probabilities) / np.float32(temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def fold_into(head: Head, temperature: float) -> Head:
    """Return the head whose logits are divided by the temperature."""
    divisor = np.float32(temperature)
    return replace(head, weight=head.weight / divisor, bias=head.bias / divisor)


def cross_rescale(
    probabilities: FloatArray, targets: IntArray, fold_of: IntArray
) -> tuple[FloatArray, float]:
    """Return rows scaled by the temperature of the other folds, and the temperature of all rows."""
    scaled = np.empty_like(probabilities)
    for fold in range(int(fold_of.max()) + 1):
        mine = fold_of == fold
        temperature = fit_temperature(probabilities[~mine], targets[~mine])
        scaled[mine] = rescale(probabilities[mine], temperature)
    return scaled, fit_temperature(probabilities, targets)


def calibration(
    temperature: float, before: FloatArray, after: FloatArray, targets: IntArray
) -> Calibration:
    """Compare the probabilities of the same held-out rows without and with a temperature."""
    return Calibration(
        temperature=temperature,
        before=quality(before, targets),
        after=quality(after, targets),
        bins=reliability(after, targets),
    )


def quality(probabilities: FloatArray, targets: IntArray) -> Quality:
    """Return ECE and mean negative log-likelihood."""
    chosen = probabilities[np.arange(len(targets)), targets].astype(np.float64)
    nll = float(-np.log(np.maximum(chosen, _SMALLEST)).mean())
    return Quality(ece=expected_error(reliability(probabilities, targets)), nll=nll)


def reliability(probabilities: FloatArray, targets: IntArray) -> tuple[Bin, ...]:
    """Sort rows by the confidence of their predicted class into `BINS` bins of equal width."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == targets
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows = np.bincount(bin_of, minlength=BINS)
    sure = np.bincount(bin_of, confidence, BINS) / np.maximum(rows, 1)
    correct = np.bincount(bin_of, right, BINS) / np.maximum(rows, 1)
    return tuple(
        Bin(rows=int(n), confidence=float(c), accuracy=float(a))
        for n, c, a in zip(rows, sure, correct, strict=True)
    )


def expected_error(bins: tuple[Bin, ...]) -> float:
    """Return the mean distance of confidence from accuracy, each row counting the same."""
    total = sum(b.rows for b in bins)
    return sum(b.rows * abs(b.confidence - b.accuracy) for b in bins) / max(total, 1)


def _logits(probabilities: npt.NDArray[np.float32]) -> FloatArray:
    return np.log(np.maximum(probabilities, np.float32(_SMALLEST)))
