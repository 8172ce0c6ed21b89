"""The data plane of prediction: what every protocol's endpoint calls, and nothing of HTTP.

    reference ──▶ live model ──▶ prepare each input ──▶ trunk (batched) ──▶ head ──▶ labels

An input that cannot be prepared or computed becomes an error in its own place; the others are
answered. Short texts are tokenised on the event loop; long ones would hold it up, so they go to
threads as images do, no more at a time than there are cores.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from core.errors import DeadlineExceeded, GraftError, InvalidRequest
from core.identifiers import ModelReference
from core.preprocessing import FloatArray, ImagePreprocessor, Prepared, TextPreprocessor
from service.metrics import PREDICTED_ROWS
from service.serving_set import LiveModel, ServingSet

SHORT_TEXT_CHARS = 4_000
"""Characters of a request that are tokenised at once: some two milliseconds."""


@dataclass(frozen=True)
class ImageInput:
    """One encoded image, or its base64 text, to be decoded off the event loop."""

    data: bytes | str


Input = str | ImageInput


@dataclass(frozen=True)
class Prediction:
    """Class probabilities for one input, largest first, as (label, probability)."""

    scores: list[tuple[str, float]]


@dataclass(frozen=True)
class Predictions:
    """The answer to one request, input by input in order; times in milliseconds."""

    model: str
    rows: list[Prediction | GraftError]
    timing_ms: dict[str, float]


class Predictor:
    """Answers predictions from the current serving set of this process."""

    def __init__(
        self, serving_set: Callable[[], ServingSet], *, threads: int, max_text_chars: int
    ) -> None:
        self._serving_set = serving_set
        self._max_text_chars = max_text_chars
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def predict(
        self,
        tenant: str,
        reference: ModelReference,
        inputs: list[Input],
        *,
        top_k: int,
        timeout_seconds: float,
    ) -> Predictions:
        """Predict every input with one model.

        Raises `NotFound` or `Unavailable` for the model, `Overloaded` and `DeadlineExceeded` for
        the whole request; what is wrong with one input is returned in its place.
        """
        started = time.monotonic()
        model = self._serving_set().resolve(tenant, reference)
        try:
            async with asyncio.timeout(timeout_seconds):
                prepared = await self._prepare(model, inputs)
        except TimeoutError:
            raise DeadlineExceeded("the inputs were not decoded before the deadline") from None
        good = [row for row in prepared if not isinstance(row, GraftError)]
        ready = time.monotonic()
        deadline = started + timeout_seconds
        encoded = iter(await model.trunk.batcher.encode(good, deadline, model.head.adapter))
        results = [row if isinstance(row, GraftError) else next(encoded) for row in prepared]
        computed = time.monotonic()
        rows = _classify(model, results, top_k)
        ended = time.monotonic()
        failed = sum(isinstance(row, GraftError) for row in rows)
        PREDICTED_ROWS.labels(outcome="ok").inc(len(rows) - failed)
        PREDICTED_ROWS.labels(outcome="error").inc(failed)
        return Predictions(
            model.manifest.reference,
            rows,
            {
                "prepare": _milliseconds(started, ready),
                "trunk": _milliseconds(ready, computed),
                "head": _milliseconds(computed, ended),
                "total": _milliseconds(started, ended),
            },
        )

    def close(self) -> None:
        """End the decoding threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _prepare(self, model: LiveModel, inputs: list[Input]) -> list[Prepared | GraftError]:
        preprocessor = model.trunk.trunk.preprocessor
        prepare: Callable[[Input], Prepared | GraftError]
        if isinstance(preprocessor, TextPreprocessor):
            prepare = partial(self._prepare_text, preprocessor)
            if sum(len(item) for item in inputs if isinstance(item, str)) <= SHORT_TEXT_CHARS:
                return [prepare(item) for item in inputs]
        else:
            prepare = partial(_prepare_image, preprocessor)
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(loop.run_in_executor(self._executor, prepare, item) for item in inputs)
        )

    def _prepare_text(self, preprocessor: TextPreprocessor, item: Input) -> Prepared | GraftError:
        if not isinstance(item, str):
            return InvalidRequest("this model reads text; send a string", param="inputs")
        if not item.strip():
            return InvalidRequest("the text is empty", param="inputs")
        if len(item) > self._max_text_chars:
            return InvalidRequest(
                f"the text is longer than {self._max_text_chars} characters", param="inputs"
            )
        try:
            return preprocessor.prepare(item)
        except (TypeError, UnicodeEncodeError):  # what tokenizers say to it, by version
            return InvalidRequest("the text holds half a surrogate pair", param="inputs")


def _prepare_image(preprocessor: ImagePreprocessor, item: Input) -> Prepared | GraftError:
    if not isinstance(item, ImageInput):
        return InvalidRequest('this model reads images; send {"image": "<base64>"}', param="inputs")
    try:
        data = item.data
        if isinstance(data, str):
            data = base64.b64decode(data, validate=True)
        return preprocessor.prepare(data)
    except (binascii.Error, UnicodeEncodeError, ValueError):
        return InvalidRequest("the image is not valid base64", param="inputs")
    except GraftError as error:
        return InvalidRequest(error.message, param="inputs", code=error.error_code)


def _classify(
    model: LiveModel, results: list[FloatArray | GraftError], top_k: int
) -> list[Prediction | GraftError]:
    features = [row for row in results if not isinstance(row, GraftError)]
    if not features:
        return [row for row in results if isinstance(row, GraftError)]
    probabilities = model.head.predict(np.stack(features))
    labels = model.manifest.labels
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    predictions = iter(
        Prediction([(labels[i], float(row[i])) for i in order])
        for row, order in zip(probabilities, top, strict=True)
    )
    return [row if isinstance(row, GraftError) else next(predictions) for row in results]


def _milliseconds(begin: float, end: float) -> float:
    return round((end - begin) * 1000, 3)
