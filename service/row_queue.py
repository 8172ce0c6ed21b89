"""The queue of a line: which of the rows that wait go into the next batch.

Order: by lane first (service.caller), then fairly between models. Each model's rows carry start
tags of a virtual clock that its own costs advance (start-time fair queueing, Goyal et al. 1996), so
a model that sends a thousand rows delays another's single row by one batch at most. Every eighth
batch begins with the lowest lane that waits, so none starves.

A batch is filled with rows about as long as the one that leads it: padding a token costs as much as
computing one, and a run of its own only some eight of them.

When the queue is full, a newcomer whose model holds less of it than another's pushes the newest
requests of the one that holds most out. All costs of a queue are in one unit: tokens, pixels, or
what decoding takes. Not here: running batches, deadlines of callers (service.line).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from core.adapter_bank import BankedAdapter
from service.caller import Lane

LOOK_AHEAD_ROWS = 256
LOWEST_LANE_EVERY = 8
RUN_COST = 8
"""What a run costs beside its rows, in tokens. Rows that are no more than this, or a quarter,
longer or shorter than the first one go with it."""

Model = Hashable


class Costed(Protocol):
    """What can wait: a prepared input, or one that is yet to be decoded."""

    @property
    def cost(self) -> int:
        """What it takes to compute."""


Item = TypeVar("Item", bound=Costed)


@dataclass(eq=False)
class QueuedRequest:
    """Rows that came together; `waiting` of them have not been taken. `is_dead` asks its caller."""

    model: Model
    lane: Lane
    is_dead: Callable[[], bool]
    adapter: BankedAdapter | None = None
    waiting: int = 0
    cost: int = 0


@dataclass(order=True, slots=True)
class Row(Generic[Item]):
    """One row; ordered by its turn."""

    turn: tuple[float, int]
    item: Item = field(compare=False)
    request: QueuedRequest = field(compare=False)
    index: int = field(compare=False)


@dataclass
class _Share:
    """What one model holds of the queue, its newest request last."""

    requests: dict[QueuedRequest, None] = field(default_factory=dict)
    rows: int = 0
    cost: int = 0


class RowQueue(Generic[Item]):
    """Rows that wait, at most `max_rows`."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows = 0
        """Rows that wait and that somebody waits for."""
        self._lanes: dict[Lane, list[Row[Item]]] = {lane: [] for lane in Lane}
        self._shares: dict[Model, _Share] = {}
        self._costs = dict.fromkeys(Lane, 0)
        self._clock = 0.0
        self._tags: dict[Model, float] = {}
        self._count = 0
        self._batches = 0

    def add(self, request: QueuedRequest, rows: list[tuple[int, Item]]) -> None:
        """Queue the rows of a request, which are (index, item), in their order."""
        share = self._shares.setdefault(request.model, _Share())
        tag = max(self._clock, self._tags.get(request.model, 0.0))
        for index, item in rows:
            self._count += 1
            row = Row((tag, self._count), item, request, index)
            heapq.heappush(self._lanes[request.lane], row)
            tag += item.cost
            request.cost += item.cost
        self._tags[request.model] = tag
        request.waiting += len(rows)
        share.requests[request] = None
        share.rows += len(rows)
        share.cost += request.cost
        self._costs[request.lane] += request.cost
        self.rows += len(rows)

    def make_room(self, model: Model, lane: Lane, rows: int) -> list[QueuedRequest] | None:
        """Return whose rows were pushed out so that `rows` of a model fit; None if they cannot.

        Only requests of the same lane or a lower one go, and only those of a model that holds more
        than the newcomer's would.
        """
        needed = self.rows + rows - self.max_rows
        if needed <= 0:
            return []
        own = self._shares[model].rows if model in self._shares else 0
        largest = max(self._shares.values(), key=lambda share: share.rows)
        if own + rows >= largest.rows:
            return None
        pushed_out: list[QueuedRequest] = []
        for request in reversed(largest.requests):
            if request.lane >= lane and needed > 0:
                needed -= request.waiting
                pushed_out.append(request)
        if needed > 0:
            return None
        for request in pushed_out:
            self.forget(request)
        return pushed_out

    def forget(self, request: QueuedRequest) -> None:
        """Take what still waits of a request out; harmless when nothing does."""
        share = self._shares.get(request.model)
        if share is None or request not in share.requests:
            return
        del share.requests[request]
        self._leave(share, request, request.waiting, request.cost)
        request.waiting = request.cost = 0
        if sum(map(len, self._lanes.values())) > 2 * self.max_rows:
            for lane, waiting in self._lanes.items():
                self._lanes[lane] = [row for row in waiting if row.request.waiting]
                heapq.heapify(self._lanes[lane])

    def cost_until(self, model: Model, lane: Lane, cost: int) -> int:
        """Return about what will have been computed when `cost` more of a model has been."""
        waiting = sum(self._costs[each] for each in Lane if each <= lane)
        own = self._shares[model].cost if model in self._shares else 0
        models = len(self._shares) + (model not in self._shares)
        return min(waiting + cost, (own + cost) * models)

    def take(self, max_rows: int, budget: int) -> list[Row[Item]]:
        """Take the next batch: `budget` bounds its rows times their width, if it is not but one."""
        self._batches += 1
        from_below = self._batches % LOWEST_LANE_EVERY == 0
        batch: list[Row[Item]] = []
        passed: list[Row[Item]] = []
        lead = width = 0
        for row in self._in_turn(from_below):
            cost = row.item.cost
            if not batch:
                lead = cost
            wider = max(width, cost)
            is_near = abs(cost - lead) <= max(RUN_COST, lead // 4)
            if batch and not (is_near and wider * (len(batch) + 1) <= budget):
                passed.append(row)
            else:
                batch.append(row)
                width = wider
            if len(batch) == max_rows or len(passed) == LOOK_AHEAD_ROWS:
                break
            if width * (len(batch) + 1) > budget:
                break
        for row in passed:
            heapq.heappush(self._lanes[row.request.lane], row)
        for row in batch:
            self._clock = max(self._clock, row.turn[0])
            self._taken(row)
        return batch

    def drain(self) -> Iterator[QueuedRequest]:
        """Take every request out."""
        for share in list(self._shares.values()):
            for request in list(share.requests):
                self.forget(request)
                yield request

    # -- inside ------------------------------------------------------------------------------

    def _in_turn(self, from_below: bool) -> Iterator[Row[Item]]:
        """Pop the rows that somebody waits for, in order."""
        for lane in sorted(Lane, reverse=from_below):
            waiting = self._lanes[lane]
            while waiting:
                row = heapq.heappop(waiting)
                if not row.request.waiting:
                    continue
                if row.request.is_dead():
                    self.forget(row.request)
                    continue
                yield row

    def _taken(self, row: Row[Item]) -> None:
        request = row.request
        share = self._shares[request.model]
        request.waiting -= 1
        request.cost -= row.item.cost
        if not request.waiting:
            del share.requests[request]
        self._leave(share, request, 1, row.item.cost)

    def _leave(self, share: _Share, request: QueuedRequest, rows: int, cost: int) -> None:
        share.rows -= rows
        share.cost -= cost
        self._costs[request.lane] -= cost
        self.rows -= rows
        if not share.requests:
            del self._shares[request.model]
            if self._tags[request.model] <= self._clock or not self._shares:
                del self._tags[request.model]
        if not self._shares:
            self._tags.clear()
