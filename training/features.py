"""Items to features: one pass over a data set through the trunk that will serve it.

Several batches run at once, each on one thread, which keeps the cores busier than several threads
on one batch (docs/decisions/0008): give it a trunk that was loaded with `threads=1`. Texts are
tokenised by the same threads, and sorted by length within a chunk, so that a batch holds little
padding. Images are decoded by the thread that encodes them, so one thread decodes while another
computes, and only a few are ever decoded.

Not here: the trunk itself (core.trunk), keeping features for the next job
(training.feature_cache).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from core.adapters import Deltas
from core.errors import DataError, InvalidRequest
from core.preprocessing import (
    FloatArray,
    ImagePreprocessor,
    Prepared,
    PreparedText,
    TextPreprocessor,
)
from core.trunk import Trunk

TOKENS_PER_BATCH = 512
"""Tokens of one batch with its padding: below 384 calls cost more, above 512 the cache is left."""

IMAGES_PER_BATCH = 4
TEXTS_PER_CHUNK = 4096
"""Texts that are tokenised and sorted together: of 1,024, 3 % of a batch would be padding."""

TEXTS_PER_TASK = 256
PROGRESS_SECONDS = 0.5

Encode = Callable[[Sequence[Prepared]], FloatArray]


@dataclass(frozen=True)
class _Batch:
    """Which items a batch holds, and how to compute their features."""

    indices: Sequence[int]
    compute: Callable[[], FloatArray]


def extract(
    trunk: Trunk,
    items: Sequence[str] | Sequence[bytes],
    *,
    threads: int,
    on_progress: Callable[[int, int], None],
    row_of: Callable[[int], int] = int,
    deltas: Deltas | None = None,
) -> FloatArray:
    """Return the features of texts or encoded images, float32 [len(items), dim], in their order.

    `on_progress(done, total)` is called in this thread at least every half second, and whatever it
    raises ends the work. `deltas` are for every row. Raises `DataError` for an image that cannot
    be read, naming the row of the data set that `row_of` its index is.
    """
    features = np.empty((len(items), trunk.dim), np.float32)
    done = 0
    on_progress(done, len(items))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="features")

    def prepare(texts: Sequence[str]) -> list[PreparedText]:
        """Tokenise in the pool, behind what it has begun."""
        assert isinstance(trunk.preprocessor, TextPreprocessor)
        tasks = [
            pool.submit(
                trunk.preprocessor.prepare_many, list(texts[start : start + TEXTS_PER_TASK])
            )
            for start in range(0, len(texts), TEXTS_PER_TASK)
        ]
        while wait(tasks, timeout=PROGRESS_SECONDS).not_done:
            on_progress(done, len(items))
        return [text for task in tasks for text in task.result()]

    try:
        encode: Encode = trunk.encode if not deltas else partial(trunk.encode, deltas=deltas)
        batches = (
            _text_batches(prepare, encode, cast("Sequence[str]", items))
            if isinstance(trunk.preprocessor, TextPreprocessor)
            else _image_batches(trunk.preprocessor, encode, cast("Sequence[bytes]", items), row_of)
        )
        running: dict[Future[FloatArray], _Batch] = {}
        while True:
            # One batch more than threads, so that none of them waits for this one.
            for batch in itertools.islice(batches, threads + 1 - len(running)):
                running[pool.submit(batch.compute)] = batch
            if not running:
                return features
            finished, _ = wait(running, timeout=PROGRESS_SECONDS, return_when=FIRST_COMPLETED)
            for future in finished:
                indices = running.pop(future).indices
                features[indices] = future.result()
                done += len(indices)
            on_progress(done, len(items))
    finally:
        pool.shutdown(cancel_futures=True)


def _text_batches(
    prepare: Callable[[Sequence[str]], list[PreparedText]], encode: Encode, texts: Sequence[str]
) -> Iterator[_Batch]:
    for start in range(0, len(texts), TEXTS_PER_CHUNK):
        prepared = prepare(texts[start : start + TEXTS_PER_CHUNK])
        order = sorted(range(len(prepared)), key=lambda index: prepared[index].cost)
        for group in _under_budget(order, prepared):
            rows = [prepared[index] for index in group]
            indices = [start + index for index in group]
            yield _Batch(indices, partial(encode, rows))


def _under_budget(order: Sequence[int], prepared: Sequence[PreparedText]) -> Iterator[list[int]]:
    """Cut ascending lengths into groups whose padded size is at most the budget, or one row."""
    group: list[int] = []
    for index in order:
        if group and prepared[index].cost * (len(group) + 1) > TOKENS_PER_BATCH:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _image_batches(
    preprocessor: ImagePreprocessor, encode: Encode, images: Sequence[bytes],
    row_of: Callable[[int], int],
) -> Iterator[_Batch]:  # fmt: skip
    for start in range(0, len(images), IMAGES_PER_BATCH):
        indices = range(start, min(start + IMAGES_PER_BATCH, len(images)))
        yield _Batch(
            indices, partial(_encode_images, preprocessor, encode, images, indices, row_of)
        )


def _encode_images(
    preprocessor: ImagePreprocessor, encode: Encode, images: Sequence[bytes],
    indices: Sequence[int], row_of: Callable[[int], int],
) -> FloatArray:  # fmt: skip
    rows = []
    for index in indices:
        try:
            rows.append(preprocessor.prepare(images[index]))
        except InvalidRequest as error:
            raise DataError(f"row {row_of(index) + 1}: {error.message}") from error
    return encode(rows)
