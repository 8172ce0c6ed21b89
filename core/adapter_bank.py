"""The adapter bank: the deltas of every loaded model on one trunk, gathered by row for a batch.

For each slot and rank there is a *shelf*: two arrays, `a` [capacity, in, rank] and `b` [capacity,
rank, out]. A model has a place on the shelf of each slot that it changes; place 0 is zeros, for the
rows that have no delta there. A batch is fed the shelves as they are, and which place each row
takes. Only where its rows have deltas of several ranks in one slot, or for a trunk of before, which
takes each row's own, they are copied together.

A place is taken for as long as anybody holds the `BankedAdapter`, and its numbers do not change
meanwhile. Shelves double when they are full; `shrink` halves those whose upper half is free. Both
replace the array by a copy, so one thread may gather while others add. The lowest free place is
taken first, and what was never written takes no memory: a bank takes no more than the most
adapters that were held at a time. Not here: what an adapter is, how its file is read
(core.adapters).
"""

from __future__ import annotations

import heapq
import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.adapters import ROWS, Adapter, Delta, Deltas, input_names, no_delta
from core.manifests import Slot
from core.preprocessing import FloatArray

FIRST_CAPACITY = 4
_NO_SCRATCH: FloatArray = np.empty(0, np.float32)

Places = npt.NDArray[np.intp]
Pair = tuple[FloatArray, FloatArray]


@dataclass(frozen=True, eq=False)
class BankedAdapter:
    """One model's place in the bank, free again when nobody holds this any more.

    `ranks` and `places` int [slots]: on which shelf of each slot, and where; 0 and 0 for none.
    """

    ranks: Places
    places: Places
    bytes: int


class _Shelf:
    """The deltas of one rank on one slot. Changed under the bank's lock, read without."""

    def __init__(self, slot: Slot, rank: int) -> None:
        self.arrays: Pair = (
            np.zeros((FIRST_CAPACITY, slot.in_dim, rank), np.float32),
            np.zeros((FIRST_CAPACITY, rank, slot.out_dim), np.float32),
        )
        self._end = 1
        """Places from here on were never taken, or not since they were last given back."""
        self._free: list[int] = []

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def is_empty(self) -> bool:
        return self._end - 1 == len(self._free)

    def put(self, delta: Delta) -> int:
        """Return the place of a delta that was copied there."""
        place = heapq.heappop(self._free) if self._free else self._end
        self._end = max(self._end, place + 1)
        if place == len(self.arrays[0]):
            self._resize(2 * place)
        a, b = self.arrays
        a[place], b[place] = delta.a, delta.b
        return place

    def give_back(self, place: int) -> None:
        heapq.heappush(self._free, place)

    def shrink(self) -> None:
        """Forget the free places at the end, and halve the arrays as often as that allows."""
        free = set(self._free)
        while self._end - 1 in free:
            self._end -= 1
        self._free = sorted(place for place in free if place < self._end)
        capacity = len(self.arrays[0])
        while capacity > FIRST_CAPACITY and self._end <= capacity // 2:
            capacity //= 2
        if capacity < len(self.arrays[0]):
            self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        a, b = self.arrays
        self.arrays = _resized(a, capacity), _resized(b, capacity)


class _Room:
    """Memory that arrays are gathered into, one behind the other."""

    def __init__(self, memory: FloatArray) -> None:
        self._memory = memory
        self._used = 0

    def take(self, array: FloatArray, places: Places) -> FloatArray:
        """Return a copy of the array's rows at these places."""
        shape = len(places), *array.shape[1:]
        end = self._used + math.prod(shape)
        out = self._memory[self._used : end].reshape(shape)
        self._used = end
        # Any mode but "raise" writes to `out` without a copy between.
        return array.take(places, axis=0, out=out, mode="clip")


class AdapterBank:
    """The deltas of the models on a trunk with these slots; does it take them by `rows`?"""

    def __init__(self, slots: Sequence[Slot], *, takes_rows: bool = False) -> None:
        self._slots = slots
        self._takes_rows = takes_rows
        self._numbers = {slot.name: number for number, slot in enumerate(slots)}
        self._shelves: dict[tuple[int, int], _Shelf] = {}
        self._none = [(delta.a[None], delta.b[None]) for delta in map(no_delta, slots)]
        self._widths = np.array([slot.in_dim + slot.out_dim for slot in slots], np.intp)
        self._scratch = _NO_SCRATCH
        self._lock = threading.Lock()
        # Garbage is collected at any moment, also while this very thread has the lock.
        self._left: deque[tuple[Places, Places]] = deque()

    @property
    def bytes(self) -> int:
        """What the shelves would take if every place of theirs were written."""
        with self._lock:
            return sum(shelf.bytes for shelf in self._shelves.values())

    def add(self, adapter: Adapter) -> BankedAdapter:
        """Copy an adapter's deltas into the bank; its slots must be the bank's."""
        ranks = np.zeros(len(self._slots), np.intp)
        places = np.zeros(len(self._slots), np.intp)
        with self._lock:
            self._take_back()
            for name, delta in adapter.deltas.items():
                number = self._numbers[name]
                key = number, delta.rank
                if key not in self._shelves:
                    self._shelves[key] = _Shelf(self._slots[number], delta.rank)
                ranks[number], places[number] = delta.rank, self._shelves[key].put(delta)
        size = sum(delta.a.nbytes + delta.b.nbytes for delta in adapter.deltas.values())
        banked = BankedAdapter(ranks, places, size)
        weakref.finalize(banked, self._left.append, (ranks, places)).atexit = False
        return banked

    def shrink(self) -> None:
        """Give back the memory of adapters that nobody holds any more, and of the last batch."""
        with self._lock:
            self._scratch = _NO_SCRATCH
            self._take_back()
            for key, shelf in list(self._shelves.items()):
                if shelf.is_empty:
                    del self._shelves[key]
                else:
                    shelf.shrink()

    def gather(self, rows: Sequence[BankedAdapter | None]) -> Deltas:
        """Return what to feed for a batch whose rows have these adapters; {} if no row has one.

        Rows that all have the same adapter share it: all is fed with a leading axis of 1. A slot
        that none names is fed zeros of rank 1, for rank 0 is what a wholly plain batch feeds. What
        is returned is good until the next batch of several adapters is gathered, by one thread at a
        time, and while the adapters are held.
        """
        first = rows[0] if rows else None
        if all(row is first for row in rows):
            rows = rows[:1]
        if not any(row is not None and row.ranks.any() for row in rows):
            return {}
        nothing = np.zeros(len(self._slots), np.intp)
        ranks = np.stack([nothing if row is None else row.ranks for row in rows], axis=1)
        places = np.stack([nothing if row is None else row.places for row in rows], axis=1)
        longest = ranks.max(axis=1)
        is_longest = ranks == longest[:, None]
        # Shorter deltas are written over the zeros of their rows.
        own = np.where(is_longest, places, 0)
        has_shorter = ((ranks > 0) & ~is_longest).any(axis=1)
        is_copied = has_shorter | (not self._takes_rows)
        room = _Room(self._scratch_of(len(rows), np.where(is_copied, longest, 0)))
        deltas: dict[str, FloatArray | npt.NDArray[np.int64]] = {}
        for number, slot in enumerate(self._slots):
            rank = int(longest[number])
            if not rank:
                pair = self._none[number]
            elif len(rows) == 1:
                pair = self._view(number, rank, int(own[number, 0]))
            elif is_copied[number]:
                pair = self._copied(number, rank, own[number], room)
                if has_shorter[number]:
                    self._add_shorter(number, ranks[number], places[number], *pair)
            else:
                pair = self._shelves[number, rank].arrays
            deltas.update(zip(input_names(slot), pair, strict=True))
        if self._takes_rows and len(rows) > 1:
            taken = np.where(is_copied[:, None], np.arange(len(rows)), own)
            deltas[ROWS] = taken.astype(np.int64)
        return deltas

    # -- inside ------------------------------------------------------------------------------

    def _scratch_of(self, rows: int, ranks: Places) -> FloatArray:
        """Return the memory that a batch is gathered into; none where it needs no copy.

        It is kept from batch to batch: the pages of a new one cost more than the copying.
        """
        needed = 0 if rows == 1 else rows * int(self._widths @ ranks)
        if needed > len(self._scratch):
            self._scratch = np.empty(needed, np.float32)
        return self._scratch

    def _view(self, number: int, rank: int, place: int) -> Pair:
        a, b = self._shelves[number, rank].arrays
        return a[place : place + 1], b[place : place + 1]

    def _copied(self, number: int, rank: int, places: Places, room: _Room) -> Pair:
        a, b = self._shelves[number, rank].arrays
        return room.take(a, places), room.take(b, places)

    def _add_shorter(
        self, number: int, ranks: Places, places: Places, a: FloatArray, b: FloatArray
    ) -> None:
        for rank in {*ranks.tolist()} - {0, a.shape[2]}:
            (rows,) = np.nonzero(ranks == rank)
            shorter_a, shorter_b = self._shelves[number, rank].arrays
            a[rows, :, :rank], b[rows, :rank] = shorter_a[places[rows]], shorter_b[places[rows]]

    def _take_back(self) -> None:
        while self._left:
            for number, (rank, place) in enumerate(zip(*self._left.popleft(), strict=True)):
                if place:
                    self._shelves[number, int(rank)].give_back(int(place))


def _resized(array: FloatArray, capacity: int) -> FloatArray:
    resized = np.zeros((capacity, *array.shape[1:]), np.float32)
    kept = min(capacity, len(array))
    resized[:kept] = array[:kept]
    return resized
