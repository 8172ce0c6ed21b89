"""One batch through the trunk, on the thread of its batcher: features or an error for each row.

Plain rows and rows of any adapters are computed together, or the plain ones by themselves where
that is cheaper. A batch that fails is run again row by row, so that a bad row fails alone. Not
here: which rows make a batch (service.row_queue), when it runs (service.batcher).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from core.adapter_bank import AdapterBank
from core.errors import GraftError
from core.preprocessing import FloatArray, Prepared, PreparedText
from core.trunk import Encoder
from service.line_request import not_computed
from service.row_queue import Row

RowResult = FloatArray | GraftError

logger = logging.getLogger("graft.service")

ADAPTED_TEXT, ADAPTED_IMAGE = 0.25, 1.2
"""What a row costs more when its batch has adapters, as a share of its cost."""

SPLIT_COST = 32
"""What two runs cost more than one, in tokens; in pixels nothing (docs/decisions/0026)."""


def run_batch(
    encoder: Encoder, bank: AdapterBank, batch: Sequence[Row[Prepared]]
) -> list[RowResult]:
    """Return each row's features [dim] or its error, in order; never raises."""
    results: dict[int, RowResult] = {}
    for numbers in _runs(batch):
        rows = [batch[number] for number in numbers]
        results.update(zip(numbers, _tried(encoder, bank, rows), strict=True))
    return [results[number] for number in range(len(batch))]


def _runs(batch: Sequence[Row[Prepared]]) -> list[Sequence[int]]:
    """Return which rows to compute together."""
    plain = [number for number, row in enumerate(batch) if row.request.adapter is None]
    if not 0 < len(plain) < len(batch):
        return [range(len(batch))]
    is_text = isinstance(batch[0].item, PreparedText)
    cost = sum(batch[number].item.cost for number in plain)
    if cost * (ADAPTED_TEXT if is_text else ADAPTED_IMAGE) <= SPLIT_COST:
        return [range(len(batch))]
    adapted = [number for number, row in enumerate(batch) if row.request.adapter is not None]
    return [plain, adapted]


def _tried(encoder: Encoder, bank: AdapterBank, rows: Sequence[Row[Prepared]]) -> list[RowResult]:
    try:
        return _computed(encoder, bank, rows)
    except Exception:
        results = [_alone(encoder, bank, row) for row in rows]
        failed = sum(isinstance(result, GraftError) for result in results)
        logger.exception("%d of a batch of %d rows could not be computed", failed, len(rows))
        return results


def _alone(encoder: Encoder, bank: AdapterBank, row: Row[Prepared]) -> RowResult:
    try:
        (result,) = _computed(encoder, bank, [row])
    except Exception:
        return not_computed()
    return result


def _computed(
    encoder: Encoder, bank: AdapterBank, rows: Sequence[Row[Prepared]]
) -> list[RowResult]:
    deltas = bank.gather([row.request.adapter for row in rows])
    features = encoder.encode([row.item for row in rows], deltas)
    if len(features) != len(rows):
        raise ValueError(f"{len(features)} results for {len(rows)} rows")
    is_finite = np.asarray(np.isfinite(features).all(axis=1)).tolist()
    return [
        row if finite else GraftError("this input gives no finite features")
        for row, finite in zip(features, is_finite, strict=True)
    ]
