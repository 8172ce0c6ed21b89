"""The micro-batcher: rows of many requests, one run of the trunk at a time.

A lone request runs at once: nothing ever waits for a timer. While a batch runs, rows gather; when
it ends, the next batch takes as many as its cost budget allows. So batches grow with the load, and
an idle line adds no delay.

Requests come and are answered in the event loop; the trunk's thread takes one batch after the other
by itself, so that it never waits for the loop, which is busy with the answers to the last one just
when the next could begin. One lock is between them: around the queue and what belongs to it.

Promises: every row is answered once, with its own features or its own error; at most
`max_queued_rows` wait, and more are refused with `Overloaded`, as is a request that would hardly be
done by its deadline; rows whose deadline has passed or whose caller has gone are dropped before
they cost anything. Not here: who goes first (service.row_queue), the run itself
(service.batch_run), preparing rows (service.inputs), heads (service.predictor).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from core.adapter_bank import AdapterBank, BankedAdapter
from core.errors import DeadlineExceeded, GraftError, Overloaded, PayloadTooLarge
from core.preprocessing import Prepared, PreparedText
from core.trunk import Encoder
from service.batch_run import RowResult, run_batch
from service.caller import Lane
from service.metrics import BATCH_ROWS, QUEUED_ROWS, REFUSED_ROWS
from service.observation import Timing
from service.row_queue import RUN_COST, Model, QueuedRequest, Row, RowQueue

logger = logging.getLogger("graft.service")

MAX_BATCH_ROWS = 64
MAX_BATCH_TOKENS = 288
"""Tokens of one batch with its padding: above some 250, more of them save nothing per token, and
while one batch runs the callers of another are answered, and ask again."""

MAX_BATCH_PIXELS = 8 * 224 * 224
CLOSE_SECONDS = 5.0
FULL_BATCH_SECONDS = 0.1
"""What a full batch is reckoned to take until one has been measured."""

USABLE_TIME = 0.8
"""Share of a request's time within which it has to be expected to be done, to be taken on. Under
overload all that wait have been waiting equally long: if it is a little too long, all is lost."""

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

    def expire(self) -> None:
        self.refuse(_too_late())


class Batcher:
    """Batches rows for one encoder. Belongs to one event loop.

    Its thread works only while rows wait and does not outlive it, so one that nobody refers to any
    more is gone: whoever holds it may go on encoding.
    """

    def __init__(
        self, encoder: Encoder, name: str, max_queued_rows: int, bank: AdapterBank | None = None
    ) -> None:
        self._encoder = encoder
        self._bank = bank or AdapterBank(())
        self._lock = threading.Lock()
        # Under the lock, these:
        self._queue = RowQueue(max_queued_rows)
        self._callers: dict[QueuedRequest, _Request] = {}
        self._running_cost = 0
        self._is_working = False
        self._is_closed = False

        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"trunk-{name}")
        self._work: Future[None] | None = None
        self._full_batch_seconds = FULL_BATCH_SECONDS
        self._counted_rows = 0
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
        loop = asyncio.get_running_loop()
        request = _Request([None] * len(rows), len(rows), deadline, loop.create_future())
        queued = QueuedRequest(model, lane, request.is_dead, adapter)
        with self._lock:
            self._admit(queued, request, rows)
            begins, self._is_working = not self._is_working, True
        if begins:
            self._work = self._executor.submit(self._run_batches, loop)
        timer = loop.call_later(deadline - began, request.expire)
        try:
            await request.done
        finally:
            timer.cancel()
            # A caller that is cancelled or late marks its rows as not worth computing.
            request.done.cancel()
            with self._lock:
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
        with self._lock:
            self._is_closed = True
            waiting = [self._callers[queued] for queued in self._queue.drain()]
        for request in waiting:
            request.refuse(_shutting_down())
        if self._work is not None:
            await asyncio.wait([asyncio.wrap_future(self._work)], timeout=CLOSE_SECONDS)
        self._executor.shutdown(wait=False)

    def _admit(self, queued: QueuedRequest, request: _Request, rows: Sequence[Prepared]) -> None:
        model, lane = queued.model, queued.lane
        if self._is_closed:
            raise _shutting_down()
        if len(rows) > self._queue.max_rows:
            raise PayloadTooLarge(f"send at most {self._queue.max_rows} inputs in a request")
        now = time.monotonic()
        if request.deadline <= now:
            raise _too_late()
        cost = sum(row.cost for row in rows)
        before = self._running_cost + self._queue.cost_until(model, lane, cost)
        wait = before / _budget(rows[0]) * self._full_batch_seconds
        is_idle = not self._running_cost and not self._queue.rows
        if not is_idle and wait > USABLE_TIME * (request.deadline - now):
            self._refused_rows.inc(len(rows))
            raise _too_many(wait)
        pushed_out = self._queue.make_room(model, lane, len(rows))
        if pushed_out is None:
            self._refused_rows.inc(len(rows))
            raise _too_many(wait)
        for other in pushed_out:
            self._refused_rows.inc(len(self._callers[other].results))
            self._callers[other].refuse(_too_many(wait))
        self._callers[queued] = request
        # Shortest first, so that neighbours in a batch need little padding.
        self._queue.add(queued, sorted(enumerate(rows), key=lambda row: row[1].cost))

    # -- on the trunk's thread ---------------------------------------------------------------

    def _run_batches(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run batches until no row waits."""
        try:
            while batch := self._take():
                began = time.monotonic()
                results = run_batch(self._encoder, self._bank, [row for row, _ in batch])
                self._learn(batch, time.monotonic() - began)
                loop.call_soon_threadsafe(self._answer, batch, results)
        except BaseException:
            # Those of this batch will be told when their time is up; the next request starts anew.
            self._is_working = False
            logger.exception("running batches")
            raise

    def _take(self) -> list[tuple[Row, _Request]]:
        with self._lock:
            rows = self._queue.take(MAX_BATCH_ROWS, _budget)
            self._running_cost = sum(row.prepared.cost for row in rows)
            # Told under the lock: a row that is added from now on needs the thread started again.
            self._is_working = bool(rows)
            batch = [(row, self._callers[row.request]) for row in rows]
        now = time.monotonic()
        for _, request in batch:
            request.taken = request.taken or now
        return batch

    def _learn(self, batch: list[tuple[Row, _Request]], seconds: float) -> None:
        """Reckon anew how long a full batch takes."""
        share = (self._running_cost + RUN_COST) / _budget(batch[0][0].prepared)
        usual = self._full_batch_seconds
        self._full_batch_seconds += SMOOTHING * (min(seconds / share, 4 * usual) - usual)

    # -- in the event loop again -------------------------------------------------------------

    def _answer(self, batch: list[tuple[Row, _Request]], results: list[RowResult]) -> None:
        for (row, request), result in zip(batch, results, strict=True):
            request.finish(row.index, result)
        self._batch_rows.observe(len(batch))
        waiting = self._queue.rows
        self._queued_rows.inc(waiting - self._counted_rows)  # others may count under the same name
        self._counted_rows = waiting


def _budget(row: Prepared) -> int:
    return MAX_BATCH_TOKENS if isinstance(row, PreparedText) else MAX_BATCH_PIXELS


def _too_many(wait_seconds: float) -> Overloaded:
    return Overloaded("too many predictions are waiting", retry_after_seconds=wait_seconds)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the prediction was not ready before its deadline")


def _shutting_down() -> Overloaded:
    return Overloaded("the service is shutting down", retry_after_seconds=1)
