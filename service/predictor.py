"""The data plane: what every protocol's endpoint calls, and nothing of HTTP.

    reference ──▶ live model ──▶ prepare each input ──▶ trunk (batched) ──▶ head ──▶ labels
    backbone  ──▶ live trunk ──▶ prepare each input ──▶ trunk (batched) ──▶ features

Endpoints translate; what is answered, refused and measured is decided here. An input that cannot be
prepared or computed becomes an error in its own place, and the others are answered.

Not here: preparing (service.inputs), batching (service.batcher), which version answers
(service.hot_loader), what becomes of the measurements (service.observation).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.adapter_bank import BankedAdapter
from core.errors import GraftError, InvalidRequest
from core.identifiers import ModelReference
from core.preprocessing import FloatArray, PreparedImage, PreparedText, TextPreprocessor
from service.answers import Prediction, Predictions, describe
from service.auto_rollback import AutoRollback
from service.caller import CALLER
from service.explanation import Weight, occlude_image, occlude_text
from service.hot_loader import HotLoader
from service.inputs import Input, InputPreparer
from service.live_models import LiveModel, loaded_within
from service.live_trunks import LiveTrunk
from service.metrics import ModelLabels
from service.observation import Timing, observed
from service.shadow import Shadows


@dataclass(frozen=True)
class Classification:
    """What the head gives, float32 [width], for each input, in order (core.tasks).

    `features` are what they were computed from, float32 [dim]; `novelty` is None for what has none,
    or where it was not asked for.
    """

    model: LiveModel
    rows: list[FloatArray | GraftError]
    features: list[FloatArray | GraftError]
    novelty: list[float | None]
    timing: Timing


@dataclass(frozen=True)
class Embedding:
    """Features, float32 [dim], of one input; `tokens` that a text was read as, 0 for an image."""

    features: FloatArray
    tokens: int


@dataclass(frozen=True)
class Embeddings:
    """The features of each input, in order."""

    model: str
    rows: list[Embedding | GraftError]
    timing: Timing


class Predictor:
    """Answers predictions from what this process serves."""

    def __init__(
        self,
        loader: HotLoader,
        rollback: AutoRollback,
        *,
        threads: int,
        max_text_chars: int,
        max_queued_rows: int,
        labels: ModelLabels,
    ) -> None:
        self._loader = loader
        self._rollback = rollback
        self._inputs = InputPreparer(
            threads=threads, max_text_chars=max_text_chars, max_queued_rows=max_queued_rows
        )
        self._labels = labels
        self._shadows = Shadows(loader.live.get, self._inputs, rollback.compared, labels)

    async def resolve(
        self, tenant: str, reference: ModelReference, *, timeout_seconds: float
    ) -> LiveModel:
        """Return the live model that a reference means, loaded if it was not.

        Raises `NotFound`, `Unavailable`, or `DeadlineExceeded`; the loading goes on then.
        """
        async with loaded_within(timeout_seconds):
            return await self._loader.resolve(tenant, reference, CALLER.get().routing_key)

    async def predict(
        self,
        tenant: str,
        reference: ModelReference,
        inputs: Sequence[Input],
        *,
        top_k: int,
        timeout_seconds: float,
    ) -> Predictions:
        """Return every input's answer, with `top_k` scores at most; raises as `classify` does."""
        began = time.monotonic()
        model = await self.resolve(tenant, reference, timeout_seconds=timeout_seconds)
        left = timeout_seconds - (time.monotonic() - began)
        found = await self.classify(model, inputs, timeout_seconds=left, with_novelty=True)
        rows: list[Prediction | GraftError] = [
            row if isinstance(row, GraftError) else describe(model.manifest, row, top_k, novelty)
            for row, novelty in zip(found.rows, found.novelty, strict=True)
        ]
        return Predictions(model.manifest.reference, rows, found.timing.milliseconds())

    async def explain(
        self, model: LiveModel, item: Input, label: str | None, *, timeout_seconds: float
    ) -> list[Weight]:
        """Return how much each part of an input speaks for a label; only for usable inputs.

        Without labels it is how much each part adds to the value.

        Raises `Overloaded` and `DeadlineExceeded`. A part without which nothing can be computed
        is left out.
        """
        deadline = time.monotonic() + timeout_seconds
        preprocessor = model.trunk.trunk.preprocessor
        name, lane = model.manifest.name, CALLER.get().lane
        (whole,) = await self._inputs.prepare(model.trunk, [item], deadline, model=name, lane=lane)
        if isinstance(whole, GraftError):
            raise whole
        if isinstance(whole, PreparedImage):
            occluded = await asyncio.to_thread(occlude_image, whole)
        else:
            assert isinstance(item, str)
            assert isinstance(preprocessor, TextPreprocessor)
            occluded = await asyncio.to_thread(occlude_text, item, preprocessor.prepare)
        encoded = await model.trunk.batcher.encode(
            [whole, *(prepared for _, prepared in occluded)],
            deadline,
            model=name,
            lane=lane,
            adapter=model.head.adapter,
        )
        first, *rows = _classify(model, encoded)
        if isinstance(first, GraftError):
            raise first
        index = 0 if label is None else model.manifest.labels.index(label)
        return [
            Weight(part, float(first[index] - row[index]))
            for (part, _), row in zip(occluded, rows, strict=True)
            if not isinstance(row, GraftError)
        ]

    async def classify(
        self, model: LiveModel, inputs: Sequence[Input], *, timeout_seconds: float,
        with_novelty: bool = False,
    ) -> Classification:  # fmt: skip
        """Return what the head gives for every input.

        Raises `Overloaded` and `DeadlineExceeded` for the whole request; what is wrong with one
        input is returned in its place.
        """
        meters = self._labels.meters(model.manifest.name)
        with observed(model.manifest.reference, len(inputs), meters) as inference:
            features, _ = await self._encode(
                model.trunk,
                model.manifest.name,
                inputs,
                timeout_seconds,
                inference.timing,
                model.head.adapter,
            )
            began = time.monotonic()
            novelty: list[float | None] = [None] * len(inputs)
            if with_novelty:
                novelty = _novelty(model, features)
            rows = _classify(model, features)
            inference.timing.head = time.monotonic() - began
            inference.failed_rows = sum(isinstance(row, GraftError) for row in rows)
        self._tell(model, inputs, features, rows)
        return Classification(model, rows, features, novelty, inference.timing)

    async def classify_features(self, model: LiveModel, features: FloatArray) -> Classification:
        """Return what the head gives for features, float32 [n, dim], that the caller has kept.

        Raises `InvalidRequest` for another width; a row that is not finite is an error in place.
        """
        if features.ndim != 2 or features.shape[1] != model.manifest.dim:
            raise InvalidRequest(
                f"features of this model are [n, {model.manifest.dim}]", param="features"
            )
        refusal = InvalidRequest("the features are not finite numbers", param="features")
        results: list[FloatArray | GraftError] = [
            row if np.isfinite(row).all() else refusal for row in features
        ]
        meters = self._labels.meters(model.manifest.name)
        with observed(model.manifest.reference, len(features), meters) as inference:
            began = time.monotonic()
            rows = _classify(model, results)
            inference.timing.head = time.monotonic() - began
            inference.failed_rows = sum(isinstance(row, GraftError) for row in rows)
        self._tell(model, None, results, rows)
        return Classification(model, rows, results, [None] * len(rows), inference.timing)

    async def embed(
        self,
        reference: str,
        name: str,
        trunk: LiveTrunk,
        inputs: Sequence[Input],
        *,
        adapter: BankedAdapter | None = None,
        timeout_seconds: float,
    ) -> Embeddings:
        """Return the features of every input.

        `reference` is what answers, a version or a backbone; under `name` it is counted and takes
        its turns, as predictions do.
        """
        meters = self._labels.meters(name)
        with observed(reference, len(inputs), meters) as inference:
            features, tokens = await self._encode(
                trunk, name, inputs, timeout_seconds, inference.timing, adapter
            )
            rows: list[Embedding | GraftError] = [
                row if isinstance(row, GraftError) else Embedding(row, count)
                for row, count in zip(features, tokens, strict=True)
            ]
            inference.failed_rows = sum(isinstance(row, GraftError) for row in rows)
        return Embeddings(reference, rows, inference.timing)

    async def close(self) -> None:
        """End the decoding threads, and the shadows."""
        await self._shadows.close()
        await self._inputs.close()

    def _tell(
        self,
        model: LiveModel,
        inputs: Sequence[Input] | None,
        features: Sequence[FloatArray | GraftError],
        rows: Sequence[FloatArray | GraftError],
    ) -> None:
        """Tell those who judge the release, and its shadow, what has been answered."""
        self._rollback.answered(model, len(rows), sum(map(_is_failure, rows)))
        self._shadows.offer(model, inputs, features, rows)

    async def _encode(
        self,
        trunk: LiveTrunk,
        name: str,
        inputs: Sequence[Input],
        timeout_seconds: float,
        timing: Timing,
        adapter: BankedAdapter | None = None,
    ) -> tuple[list[FloatArray | GraftError], list[int]]:
        """Return each input's features, and how many tokens it was read as."""
        began = time.monotonic()
        deadline, lane = began + timeout_seconds, CALLER.get().lane
        try:
            prepared = await self._inputs.prepare(trunk, inputs, deadline, model=name, lane=lane)
        finally:
            timing.prepare = time.monotonic() - began
        good = [row for row in prepared if not isinstance(row, GraftError)]
        encoded = iter(
            await trunk.batcher.encode(
                good, deadline, timing, model=name, lane=lane, adapter=adapter
            )
        )
        tokens = [len(row.ids) if isinstance(row, PreparedText) else 0 for row in prepared]
        return [row if isinstance(row, GraftError) else next(encoded) for row in prepared], tokens


def _classify(
    model: LiveModel, results: Sequence[FloatArray | GraftError]
) -> list[FloatArray | GraftError]:
    features = [row for row in results if not isinstance(row, GraftError)]
    probabilities = iter(model.head.predict(np.stack(features)) if features else ())
    rows = [row if isinstance(row, GraftError) else next(probabilities) for row in results]
    return [
        row if isinstance(row, GraftError) or np.isfinite(row).all() else _not_finite()
        for row in rows
    ]


def _not_finite() -> GraftError:
    return GraftError("this model gives no finite numbers for the input")


def _is_failure(row: FloatArray | GraftError) -> bool:
    """Tell whether a row failed through no fault of its caller's."""
    return isinstance(row, GraftError) and not isinstance(row, InvalidRequest)


def _novelty(model: LiveModel, results: Sequence[FloatArray | GraftError]) -> list[float | None]:
    good = [row for row in results if not isinstance(row, GraftError)]
    if model.head.novelty is None or not good:
        return [None] * len(results)
    scores = iter(model.head.novelty.score(np.stack(good)).tolist())
    return [None if isinstance(row, GraftError) else next(scores) for row in results]
