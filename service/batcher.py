"""The micro-batcher: rows of many requests, one run of the trunk at a time.

A lone request runs at once: nothing ever waits for a timer. While a batch runs, rows gather; when
it ends, the next batch takes as many as its cost budget allows. So batches grow with the load, and
an idle line adds no delay.

Promises: every row is answered once, with its own features or its own error; at most
`max_queued_rows` wait, and more are refused with `Overloaded`, as is a request that would not be
done by its deadline; rows whose deadline has passed or whose caller has gone are dropped before
they cost anything. Not here: who goes first (service.row_queue), the run itself
(service.batch_run), preparing rows (service.inputs), heads (service.predictor).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from core.adapter_bank import AdapterBank, BankedAdapter
from core.errors import DeadlineExceeded, GraftError, Overloaded, PayloadTooLarge
from core.preprocessing import Prepared, PreparedText
from core.trunk import Encoder
from service.batch_run import RowResult, run_batch
from service.caller import Lane
from service.metrics import BATCH_ROWS, QUEUED_ROWS, REFUSED_ROWS
from service.observation import Timing
from service.row_queue import RUN_COST, Model, QueuedRequest, RowQueue

MAX_BATCH_ROWS = 64
MAX_BATCH_TOKENS = 512
"""Tokens of one batch with its padding: above some 250, more of them save nothing per token."""

MAX_BATCH_PIXELS = 8 * 224 * 224
CLOSE_SECONDS = 5.0
FULL_BATCH_SECONDS = 0.1
"""What a full batch is reckoned to take until one has been measured."""

SMOOTHING = 0.1
"""Weight of the latest batch in that; one that stalled counts as four times the usual at most."""


@dataclass(eq=False)
class _Request:
    """Rows that came together; answered together when the last of them is done."""

    results: list[RowResult | None]
    missing: int
    deadline: float
    done: asyncio.Future[None]
    taken: float | None = None
    """When the first of its rows left the queue."""

    def is_dead(self) -> bool:
        return self.done.done() or self.deadline <= time.monotonic()

    def finish(self, index: int, result: RowResult) -> None:
        if self.results[index] is None:
            self.results[index] = result
            self.missing -= 1
            if self.missing == 0 and not self.done.done():
                self.done.set_result(None)

    def refuse(self, error: GraftError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Batcher:
    """Batches rows for one encoder. Belongs to one event loop.

    It has a task only while rows wait and no thread that outlives it, so one that nobody refers to
    any more is gone: whoever holds it may go on encoding.
    """

    def __init__(
        self, encoder: Encoder, name: str, max_queued_rows: int, bank: AdapterBank | None = None
    ) -> None:
        self._encoder = encoder
        self._bank = bank or AdapterBank(())
        self._queue = RowQueue(max_queued_rows)
        self._callers: dict[QueuedRequest, _Request] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"trunk-{name}")
        self._full_batch_seconds = FULL_BATCH_SECONDS
        self._running_cost = 0
        self._counted_rows = 0
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._batch_rows = BATCH_ROWS.labels(trunk=name)
        self._queued_rows = QUEUED_ROWS.labels(trunk=name)
        self._refused_rows = REFUSED_ROWS.labels(trunk=name)

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
        if not rows:
            return []
        began = time.monotonic()
        queued = self._admit(rows, deadline, model, lane, adapter)
        request = self._callers[queued]
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await request.done
        except TimeoutError:
            raise _too_late() from None
        finally:
            # A caller that is cancelled or late marks its rows as not worth computing.
            request.done.cancel()
            self._queue.forget(queued)
            del self._callers[queued]
            if timing is not None:
                now = time.monotonic()
                taken = request.taken or now
                timing.queue, timing.trunk = taken - began, now - taken
        return [result for result in request.results if result is not None]

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        return self._queue.rows

    async def close(self) -> None:
        """Refuse the rows that wait with `Overloaded`, and answer those that are being computed."""
        self._is_closed = True
        for queued in self._queue.drain():
            self._callers[queued].refuse(_shutting_down())
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_SECONDS)
            self._task.cancel()
        self._executor.shutdown(wait=False)

    def _admit(
        self,
        rows: Sequence[Prepared],
        deadline: float,
        model: Model,
        lane: Lane,
        adapter: BankedAdapter | None,
    ) -> QueuedRequest:
        if self._is_closed:
            raise _shutting_down()
        if len(rows) > self._queue.max_rows:
            raise PayloadTooLarge(f"send at most {self._queue.max_rows} inputs in a request")
        if deadline <= time.monotonic():
            raise _too_late()
        cost = sum(row.cost for row in rows)
        before = self._running_cost + self._queue.cost_until(model, lane, cost)
        wait = before / _budget(rows[0]) * self._full_batch_seconds
        is_idle = not self._running_cost and not self._queue.rows
        if not is_idle and time.monotonic() + wait > deadline:
            self._refused_rows.inc(len(rows))
            raise _too_many(wait)
        pushed_out = self._queue.make_room(model, lane, len(rows))
        if pushed_out is None:
            self._refused_rows.inc(len(rows))
            raise _too_many(wait)
        for other in pushed_out:
            self._refused_rows.inc(len(self._callers[other].results))
            self._callers[other].refuse(_too_many(wait))
        done = asyncio.get_running_loop().create_future()
        request = _Request([None] * len(rows), len(rows), deadline, done)
        queued = QueuedRequest(model, lane, request.is_dead, adapter)
        self._callers[queued] = request
        # Shortest first, so that neighbours in a batch need little padding.
        self._queue.add(queued, sorted(enumerate(rows), key=lambda row: row[1].cost))
        return queued

    async def _run(self) -> None:
        """Run batches until no row waits."""
        loop = asyncio.get_running_loop()
        while batch := self._queue.take(MAX_BATCH_ROWS, _budget):
            began = time.monotonic()
            requests = [self._callers[row.request] for row in batch]
            for request in requests:
                request.taken = request.taken or began
            self._running_cost = sum(row.prepared.cost for row in batch)
            try:
                results = await loop.run_in_executor(
                    self._executor, run_batch, self._encoder, self._bank, batch
                )
            finally:
                share = (self._running_cost + RUN_COST) / _budget(batch[0].prepared)
                self._running_cost = 0
            usual = self._full_batch_seconds
            latest = min((time.monotonic() - began) / share, 4 * usual)
            self._full_batch_seconds += SMOOTHING * (latest - usual)
            for row, request, result in zip(batch, requests, results, strict=True):
                request.finish(row.index, result)
            self._batch_rows.observe(len(batch))
            self._queued_rows.inc(self._queue.rows - self._counted_rows)
            self._counted_rows = self._queue.rows


def _budget(row: Prepared) -> int:
    return MAX_BATCH_TOKENS if isinstance(row, PreparedText) else MAX_BATCH_PIXELS


def _too_many(wait_seconds: float) -> Overloaded:
    return Overloaded("too many predictions are waiting", retry_after_seconds=wait_seconds)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the prediction was not ready before its deadline")


def _shutting_down() -> Overloaded:
    return Overloaded("the service is shutting down", retry_after_seconds=1)
