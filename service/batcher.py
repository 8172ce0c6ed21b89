"""The micro-batcher: rows of many requests, one run of the trunk at a time.

While a batch runs, rows gather in the line before it; when it ends, the next batch takes as many as
its cost budget allows. So batches grow with the load, and an idle line adds no delay.

Not here: who is let in and when a batch begins (service.line), who goes first (service.row_queue),
the run itself (service.batch_run), preparing rows (service.inputs), heads (service.predictor).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from core.adapter_bank import AdapterBank, BankedAdapter
from core.datasets import Modality
from core.preprocessing import FloatArray, Prepared
from core.trunk import Encoder
from service.batch_run import RowResult, run_batch
from service.caller import Lane
from service.line import Line
from service.line_request import Request
from service.metrics import BATCH_ROWS
from service.observation import Timing
from service.row_queue import Model

MAX_BATCH_TOKENS = 288
"""Tokens of one batch with its padding: above some 250, more of them save nothing per token, and
while one batch runs the callers of another are answered, and ask again."""

MAX_BATCH_PIXELS = 8 * 224 * 224
FULL_BATCH_SECONDS = 0.1
"""What a full batch is reckoned to take until one has been measured."""


class Batcher:
    """Batches rows for one encoder. Belongs to one event loop, and whoever holds it may use it."""

    def __init__(
        self, encoder: Encoder, name: str, max_queued_rows: int, bank: AdapterBank | None = None
    ) -> None:
        self._batch_rows = BATCH_ROWS.labels(trunk=name)
        self._line: Line[Prepared, FloatArray] = Line(
            name,
            partial(run_batch, encoder, bank or AdapterBank(())),
            budget=MAX_BATCH_TOKENS if encoder.modality is Modality.TEXT else MAX_BATCH_PIXELS,
            max_queued_rows=max_queued_rows,
            full_batch_seconds=FULL_BATCH_SECONDS,
            batch_rows=self._batch_rows,
        )

    async def encode(
        self,
        rows: Sequence[Prepared],
        deadline: float,
        timing: Timing | None = None,
        *,
        model: Model = None,
        lane: Lane = Lane.NORMAL,
        adapter: BankedAdapter | None = None,
    ) -> list[RowResult]:
        """Return each row's features [dim] with the adapter, or its error, in order.

        `deadline` is on the clock of `time.monotonic`; `timing` is told how long the rows waited
        and how long their batches took; `model` is whose turn they take. Raises `Overloaded` when
        the queue has no room for all rows or they would come too late, and `DeadlineExceeded` when
        they are not done in time.
        """
        began = time.monotonic()
        request = Request[Prepared, FloatArray](rows, deadline, model, lane, adapter)
        try:
            return await self._line.answer(request)
        finally:
            if timing is not None and rows:
                now = time.monotonic()
                taken = request.taken or now
                timing.queue, timing.trunk = taken - began, now - taken

    def wait_seconds(self, model: Model, lane: Lane) -> float:
        """Return about how long a row of a model that came now would wait; 0 on an idle line."""
        return self._line.wait_seconds(model, lane)

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        return self._line.queued_rows

    async def close(self) -> None:
        """Refuse the rows that wait with `Overloaded`, and answer those that are being computed."""
        await self._line.close()
