"""What is said of an input: a head's numbers as labels, scores or a value, by the model's task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.datasets import Task
from core.errors import GraftError
from core.manifests import Interval, ModelManifest
from core.preprocessing import FloatArray
from core.tasks import decide


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input, by its task (core.tasks).

    `scores` are (label, probability), largest first; `labels` those of several that are given; a
    regression has a `value` instead, and an `interval`. `novelty`, 0 to 1, is None for a model that
    was made without (core.novelty).
    """

    scores: list[tuple[str, float]]
    novelty: float | None = None
    labels: list[str] | None = None
    value: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Predictions:
    """The answer to one request, input by input in order; times in milliseconds."""

    model: str
    rows: list[Prediction | GraftError]
    timing_ms: dict[str, float]


def describe(
    manifest: ModelManifest, row: FloatArray, top_k: int, novelty: float | None
) -> Prediction:
    """Return what a head's outputs for an input, float32 [width], mean by its manifest.

    Of the scores, `top_k` at most are told.
    """
    if manifest.task is Task.REGRESSION:
        return Prediction([], novelty, value=float(row[0]), interval=manifest.interval)
    scores = _likeliest(row, manifest.labels, top_k)
    given = None
    if manifest.task is Task.MULTI_LABEL:
        (answer,) = decide(manifest.task, row[None], manifest.labels)
        assert isinstance(answer, frozenset)
        given = [label for label in manifest.labels if label in answer]
    return Prediction(scores, novelty, labels=given)


def _likeliest(
    probabilities: FloatArray, labels: Sequence[str], top_k: int
) -> list[tuple[str, float]]:
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [(labels[i], float(probabilities[i])) for i in order]
