"""A line of rows before a few threads: who is let in, who waits, and who is told what.

A lone request runs at once: nothing ever waits for a timer. While the threads are busy, rows
gather; a thread that has done takes its next batch by itself, so that it never waits for the event
loop, which is busy with the answers to the last one just then. One lock is between them: around
the queue and what belongs to it.

Promises: every row is answered once, with its own result or its own error; at most
`max_queued_rows` wait, and more are refused with `Overloaded`, as is a request that would hardly be
done by its deadline; rows whose deadline has passed or whose caller has gone are dropped before
they cost anything. Not here: who goes first (service.row_queue), what is done with a batch: through
a trunk (service.batcher), decoded (service.inputs).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic

from prometheus_client import Histogram

from core.errors import GraftError, PayloadTooLarge
from service.caller import Lane
from service.line_request import (
    Request,
    Result,
    not_computed,
    shutting_down,
    too_late,
    too_many,
)
from service.metrics import QUEUED_ROWS, REFUSED_ROWS
from service.row_queue import RUN_COST, Item, Model, QueuedRequest, Row, RowQueue

logger = logging.getLogger("graft.service")

MAX_BATCH_ROWS = 64
CLOSE_SECONDS = 5.0
USABLE_TIME = 0.8
"""Share of a request's time within which it has to be expected to be done, to be taken on. Under
overload all that wait have been waiting equally long: if it is a little too long, all is lost."""

SMOOTHING = 0.1
"""Weight of the latest batch in how long one takes, unless it is among the first; one that stalled
counts as four times the usual at most."""


class Line(Generic[Item, Result]):
    """The line before `work`, which answers the rows of a batch. Belongs to one event loop.

    Its threads work only while rows wait and do not outlive it, so one that nobody refers to any
    more is gone: whoever holds it may go on. `budget` bounds the cost of a batch, and
    `full_batch_seconds` is what one is reckoned to take until some have been measured.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[Row[Item]]], Sequence[Result | GraftError]],
        *,
        budget: int,
        max_queued_rows: int,
        full_batch_seconds: float,
        threads: int = 1,
        batch_rows: Histogram | None = None,
    ) -> None:
        self._work = work
        self._budget = budget
        self._threads = threads
        self._lock = threading.Lock()
        # Under the lock, these:
        self._queue: RowQueue[Item] = RowQueue(max_queued_rows)
        self._requests: dict[QueuedRequest, Request[Item, Result]] = {}
        self._running_cost = 0
        self._working = 0
        self._is_closed = False

        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"line-{name}")
        self._runs: set[Future[None]] = set()
        self._seconds_per_cost = full_batch_seconds / budget
        self._learned_batches = 0
        self._counted_rows = 0
        self._batch_rows = batch_rows
        self._queued_rows = QUEUED_ROWS.labels(trunk=name)
        self._refused_rows = REFUSED_ROWS.labels(trunk=name)

    async def answer(self, request: Request[Item, Result]) -> list[Result | GraftError]:
        """Return the result of each row, or its error, in order.

        Raises `Overloaded` when the queue has no room for all rows or they would come too late, and
        `DeadlineExceeded` when they are not done in time.
        """
        if not request.items:
            return []
        loop = asyncio.get_running_loop()
        request.done = loop.create_future()
        queued = QueuedRequest(request.model, request.lane, request.is_dead, request.adapter)
        with self._lock:
            self._admit(queued, request)
            more = min(len(request.items), self._threads - self._working)
            self._working += more
        for _ in range(more):
            run = self._executor.submit(self._run_batches, loop)
            self._runs.add(run)
            run.add_done_callback(self._runs.discard)
        timer = loop.call_later(request.deadline - time.monotonic(), request.expire)
        try:
            await request.done
        finally:
            timer.cancel()
            # A caller that is cancelled or late marks its rows as not worth computing.
            request.done.cancel()
            with self._lock:
                self._queue.forget(queued)
                del self._requests[queued]
        return [request.results[index] for index in range(len(request.items))]

    def wait_seconds(self, model: Model, lane: Lane) -> float:
        """Return about how long a row that came now would wait."""
        with self._lock:
            return self._wait_seconds(model, lane, 0)

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        return self._queue.rows

    async def close(self) -> None:
        """Refuse the rows that wait with `Overloaded`, and answer those that are being computed."""
        with self._lock:
            self._is_closed = True
            waiting = [self._requests[queued] for queued in self._queue.drain()]
        for request in waiting:
            request.refuse(shutting_down())
        if runs := [asyncio.wrap_future(run) for run in list(self._runs)]:
            await asyncio.wait(runs, timeout=CLOSE_SECONDS)
        self._executor.shutdown(wait=False)

    # -- under the lock ----------------------------------------------------------------------

    def _admit(self, queued: QueuedRequest, request: Request[Item, Result]) -> None:
        model, lane, items = request.model, request.lane, request.items
        if self._is_closed:
            raise shutting_down()
        if len(items) > self._queue.max_rows:
            raise PayloadTooLarge(f"send at most {self._queue.max_rows} inputs in a request")
        left = request.deadline - time.monotonic()
        if left <= 0:
            raise too_late()
        wait = self._wait_seconds(model, lane, sum(item.cost for item in items))
        wait += request.seconds_after
        pushed_out = None
        if wait <= USABLE_TIME * left:
            pushed_out = self._queue.make_room(model, lane, len(items))
        if pushed_out is None:
            self._refused_rows.inc(len(items))
            raise too_many(wait)
        for other in pushed_out:
            self._refused_rows.inc(len(self._requests[other].items))
            self._requests[other].refuse(too_many(wait))
        self._requests[queued] = request
        # Shortest first, so that neighbours in a batch need little padding.
        self._queue.add(queued, sorted(enumerate(items), key=lambda row: row[1].cost))

    def _wait_seconds(self, model: Model, lane: Lane, cost: int) -> float:
        """Return about when `cost` more of a model will be done; nothing on an idle line."""
        if not self._running_cost and not self._queue.rows:
            return 0.0
        before = self._running_cost + self._queue.cost_until(model, lane, cost)
        return before * self._seconds_per_cost / self._threads

    def _take(self) -> list[tuple[Row[Item], Request[Item, Result]]]:
        """Return the next batch; nothing ends the thread."""
        with self._lock:
            rows = self._queue.take(MAX_BATCH_ROWS, self._budget)
            self._running_cost += _cost(rows)
            # Told under the lock: a row that is added from now on needs the thread started again.
            self._working -= not rows
            return [(row, self._requests[row.request]) for row in rows]

    # -- on a thread of the line -------------------------------------------------------------

    def _run_batches(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run batches until no row waits."""
        try:
            while batch := self._take():
                now = time.monotonic()
                for _, request in batch:
                    request.taken = request.taken or now
                rows = [row for row, _ in batch]
                results = self._results(rows)
                with self._lock:
                    # Before the answer: whoever gets that may find the line idle.
                    self._running_cost -= _cost(rows)
                loop.call_soon_threadsafe(self._answer, batch, results)
        except BaseException:
            logger.exception("taking a batch")
            with self._lock:
                self._working -= 1
                stranded = list(self._requests.values())
            loop.call_soon_threadsafe(_strand, stranded)
            raise

    def _results(self, rows: list[Row[Item]]) -> Sequence[Result | GraftError]:
        began = time.monotonic()
        try:
            results = self._work(rows)
        except Exception:
            # Those of this batch are told, and those that wait go on.
            logger.exception("running a batch")
            return [not_computed()] * len(rows)
        self._learn(rows, time.monotonic() - began)
        return results

    def _learn(self, rows: list[Row[Item]], seconds: float) -> None:
        """Reckon anew how long a batch takes."""
        self._learned_batches += 1
        usual = self._seconds_per_cost
        latest = seconds / (_cost(rows) + RUN_COST)
        weight = max(SMOOTHING, 1 / self._learned_batches)
        self._seconds_per_cost += weight * (min(latest, 4 * usual) - usual)

    # -- in the event loop again -------------------------------------------------------------

    def _answer(
        self,
        batch: list[tuple[Row[Item], Request[Item, Result]]],
        results: Sequence[Result | GraftError],
    ) -> None:
        for (row, request), result in zip(batch, results, strict=True):
            request.finish(row.index, result)
        if self._batch_rows is not None:
            self._batch_rows.observe(len(batch))
        waiting = self._queue.rows
        self._queued_rows.inc(waiting - self._counted_rows)  # others may count under the same name
        self._counted_rows = waiting


def _cost(rows: Iterable[Row[Item]]) -> int:
    return sum(row.item.cost for row in rows)


def _strand(requests: list[Request[Item, Result]]) -> None:
    for request in requests:
        request.refuse(not_computed())
