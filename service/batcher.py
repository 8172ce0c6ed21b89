"""The micro-batcher: rows of many requests, one run of the trunk at a time.

A lone request runs at once: nothing ever waits for a timer. While a batch runs, rows gather; when
it ends, the next batch takes as many as its cost budget allows. So batches grow with the load, and
an idle line adds no delay.

Promises: every row is answered once, with its own features or its own error; a batch that fails is
run again row by row, so that a bad row fails alone; at most `max_queued_rows` wait, and more are
refused with `Overloaded`; rows whose deadline has passed or whose caller has gone are dropped
before they cost anything. Not here: preparing rows (core.preprocessing), heads (service.predictor).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from core.errors import DeadlineExceeded, GraftError, Overloaded, PayloadTooLarge
from core.preprocessing import FloatArray, Prepared, PreparedText
from core.trunk import Encoder
from service.metrics import BATCH_ROWS, QUEUED_ROWS, REFUSED_ROWS
from service.observation import Timing

MAX_BATCH_ROWS = 64
MAX_BATCH_TOKENS = 1024
"""Tokens of one batch with its padding: above some 500, more of them save nothing per token."""

MAX_BATCH_PIXELS = 8 * 224 * 224
CLOSE_SECONDS = 5.0

RowResult = FloatArray | GraftError


@dataclass
class _Request:
    """Rows that came together; answered together when the last of them is done."""

    results: list[RowResult | None]
    missing: int
    deadline: float
    done: asyncio.Future[None] = field(repr=False)
    taken: float | None = None
    """When the first of its rows left the queue."""

    def finish(self, index: int, result: RowResult) -> None:
        if self.results[index] is None:
            self.results[index] = result
            self.missing -= 1
            if self.missing == 0 and not self.done.done():
                self.done.set_result(None)


@dataclass(frozen=True)
class _Row:
    prepared: Prepared
    request: _Request
    index: int


class Batcher:
    """Batches rows for one encoder. Belongs to one event loop.

    It has a task only while rows wait and no thread that outlives it, so one that nobody refers to
    any more is gone: whoever holds it may go on encoding.
    """

    def __init__(self, encoder: Encoder, name: str, max_queued_rows: int) -> None:
        self._encoder = encoder
        self._name = name
        self._max_queued_rows = max_queued_rows
        self._queue: deque[_Row] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"trunk-{name}")
        self._seconds_per_row = 0.01
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        # Nothing is something: a rate over a series that begins with its first event misses it.
        REFUSED_ROWS.labels(trunk=name)

    async def encode(
        self, rows: Sequence[Prepared], deadline: float, timing: Timing | None = None
    ) -> list[RowResult]:
        """Return each row's features [dim] or its error, in order.

        `deadline` is on the clock of `time.monotonic`. `timing` is told how long the rows waited,
        and how long their batches took. Raises `Overloaded` when the queue has no room for all
        rows, and `DeadlineExceeded` when they are not done in time.
        """
        if not rows:
            return []
        if self._is_closed:
            raise Overloaded("the service is shutting down", retry_after_seconds=1)
        if len(rows) > self._max_queued_rows:
            raise PayloadTooLarge(f"send at most {self._max_queued_rows} inputs in a request")
        if len(self._queue) + len(rows) > self._max_queued_rows:
            wait = len(self._queue) * self._seconds_per_row
            REFUSED_ROWS.labels(trunk=self._name).inc(len(rows))
            raise Overloaded("too many predictions are waiting", retry_after_seconds=wait)
        queued = time.monotonic()
        done = asyncio.get_running_loop().create_future()
        request = _Request([None] * len(rows), len(rows), deadline, done)
        # Shortest first, so that neighbours in a batch need little padding.
        order = sorted(range(len(rows)), key=lambda index: rows[index].cost)
        self._queue.extend(_Row(rows[index], request, index) for index in order)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await done
        except TimeoutError:
            raise DeadlineExceeded("the prediction was not ready before its deadline") from None
        finally:
            # A caller that is cancelled or late marks its rows as not worth computing.
            done.cancel()
            if timing is not None:
                now = time.monotonic()
                taken = request.taken or now
                timing.queue, timing.trunk = taken - queued, now - taken
        return [result for result in request.results if result is not None]

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        return len(self._queue)

    async def close(self) -> None:
        """Refuse the rows that wait with `Overloaded`, and answer those that are being computed."""
        self._is_closed = True
        refusal = Overloaded("the service is shutting down", retry_after_seconds=1)
        while self._queue:
            row = self._queue.popleft()
            row.request.finish(row.index, refusal)
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_SECONDS)
            self._task.cancel()
        self._executor.shutdown(wait=False)

    async def _run(self) -> None:
        """Run batches until no row waits."""
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = self._take()
            if not batch:
                continue
            began = time.monotonic()
            results = await loop.run_in_executor(self._executor, self._encode, batch)
            seconds = (time.monotonic() - began) / len(batch)
            self._seconds_per_row += 0.1 * (seconds - self._seconds_per_row)
            BATCH_ROWS.labels(trunk=self._name).observe(len(batch))
            for row, result in zip(batch, results, strict=True):
                row.request.finish(row.index, result)

    def _take(self) -> list[_Row]:
        """Take waiting rows up to the budget; texts cost the batch's width each, as padded."""
        now = time.monotonic()
        batch: list[_Row] = []
        width = 0
        while self._queue and len(batch) < MAX_BATCH_ROWS:
            row = self._queue[0]
            if row.request.done.done() or row.request.deadline <= now:
                self._queue.popleft()
                continue
            width = max(width, row.prepared.cost)
            is_text = isinstance(row.prepared, PreparedText)
            budget = MAX_BATCH_TOKENS if is_text else MAX_BATCH_PIXELS
            if batch and width * (len(batch) + 1) > budget:
                break
            if row.request.taken is None:
                row.request.taken = now
            batch.append(self._queue.popleft())
        QUEUED_ROWS.labels(trunk=self._name).set(len(self._queue))
        return batch

    def _encode(self, batch: list[_Row]) -> list[RowResult]:
        """Run on the executor's thread; never raises."""
        try:
            return self._rows(batch)
        except Exception:
            results: list[RowResult] = []
            for row in batch:
                try:
                    results += self._rows([row])
                except Exception:
                    results.append(GraftError("this input could not be computed"))
            return results

    def _rows(self, batch: list[_Row]) -> list[RowResult]:
        features = self._encoder.encode([row.prepared for row in batch])
        if len(features) != len(batch):
            raise ValueError(f"{len(features)} results for {len(batch)} rows")
        return [
            row if np.isfinite(row).all() else GraftError("this input gives no finite features")
            for row in features
        ]
