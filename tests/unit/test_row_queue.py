"""Whose turn it is: lanes, fairness between models, length, and who goes when there is no room."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from core.preprocessing import PreparedText
from service.caller import Lane
from service.row_queue import LOWEST_LANE_EVERY, QueuedRequest, RowQueue
from tests.fakes import row

BUDGET = 100


class Waiting:
    """A queue, and what was put into it."""

    def __init__(self, max_rows: int = 1000) -> None:
        self.queue: RowQueue[PreparedText] = RowQueue(max_rows)
        self.dead: set[int] = set()
        self._count = 0

    def add(
        self, model: str, *widths: int, lane: Lane = Lane.NORMAL, number: int | None = None
    ) -> QueuedRequest:
        self._count += 1
        mark = self._count if number is None else number
        request = QueuedRequest(model, lane, lambda: mark in self.dead)
        self.queue.add(request, [(n, row(mark, width)) for n, width in enumerate(widths)])
        return request

    def take(self, rows: int = 4) -> list[str]:
        return [str(each.request.model) for each in self.queue.take(rows, BUDGET)]


def test_rows_of_one_model_go_in_the_order_they_came():
    it = Waiting()
    for _ in range(6):
        it.add("a", 1)
    taken = [each.item.ids[0] for each in it.queue.take(10, BUDGET)]
    assert taken == [1, 2, 3, 4, 5, 6]
    assert (it.queue.rows, it.take()) == (0, [])


def test_a_hot_model_does_not_starve_another():
    it = Waiting()
    it.add("hot", *[1] * 500)
    it.take()
    it.add("cold", 1)
    assert "cold" in it.take()
    it.add("cold", 1, 1)
    assert it.take().count("cold") == 2


def test_models_that_all_want_more_share_alike_by_cost():
    it = Waiting()
    it.add("long", *[20] * 60)
    it.add("short", *[10] * 120)
    taken = [model for _ in range(12) for model in it.take(6)]
    costs = {model: taken.count(model) * width for model, width in (("long", 20), ("short", 10))}
    assert abs(costs["long"] - costs["short"]) <= 100


def test_a_model_that_was_away_has_no_credit_for_it():
    it = Waiting()
    it.add("a", *[1] * 100)
    it.take(50)
    it.add("b", *[1] * 100)
    assert 1 <= it.take(10).count("b") <= 6


def test_a_higher_lane_goes_first_and_the_lowest_does_not_starve():
    it = Waiting()
    it.add("low", *[1] * 4, lane=Lane.LOW)
    it.add("normal", *[1] * 4)
    it.add("high", *[1] * 100, lane=Lane.HIGH)
    taken = [it.take(2) for _ in range(2 * LOWEST_LANE_EVERY)]
    assert taken[0] == ["high", "high"]
    assert sum(batch.count("low") for batch in taken) == 4


def test_a_batch_holds_rows_of_about_one_length():
    it = Waiting()
    for width in (10, 60, 12, 61, 9):
        it.add(f"m{width}", width)
    assert it.take(10) == ["m10", "m12", "m9"]
    assert it.take(10) == ["m60"]
    assert it.take(10) == ["m61"]


def test_a_row_that_nobody_waits_for_is_passed_over():
    it = Waiting()
    it.add("a", 1, 1, number=1)
    gone = it.add("b", 1, 1, number=2)
    it.dead.add(1)
    assert it.take() == ["b", "b"]
    assert it.queue.rows == 0
    it.queue.forget(gone)
    assert it.queue.rows == 0


def test_a_full_queue_lets_a_small_model_push_out_the_newest_of_the_largest():
    it = Waiting(max_rows=10)
    first = it.add("hot", *[1] * 5)
    newest = it.add("hot", *[1] * 5)
    assert it.queue.make_room("hot", Lane.NORMAL, 1) is None
    assert it.queue.make_room("cold", Lane.LOW, 2) is None
    assert it.queue.make_room("cold", Lane.NORMAL, 2) == [newest]
    assert (it.queue.rows, first.waiting, newest.waiting) == (5, 5, 0)
    it.add("cold", 1, 1)
    assert it.queue.make_room("cold", Lane.NORMAL, 3) == []


def test_what_is_pushed_out_over_and_over_takes_no_room():
    it = Waiting(max_rows=4)
    for _ in range(200):
        it.queue.forget(it.add("a", 1, 1))
    assert sum(map(len, it.queue._lanes.values())) <= 2 * 4 + 2


def test_the_cost_ahead_is_that_of_a_fair_share_of_the_lanes_above():
    it = Waiting()
    it.add("hot", *[10] * 50)
    assert it.queue.cost_until("hot", Lane.NORMAL, 10) == 510
    assert it.queue.cost_until("cold", Lane.NORMAL, 10) == 20
    assert it.queue.cost_until("hot", Lane.HIGH, 10) == 10


ROWS = st.lists(st.integers(1, 60), min_size=1, max_size=6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abc"), st.sampled_from(list(Lane)), ROWS),
        st.integers(1, 5),
        st.just("forget"),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_every_row_is_taken_once_or_forgotten(steps):  # type: ignore[no-untyped-def]
    it = Waiting()
    taken: list[tuple[int, int]] = []
    expected: dict[QueuedRequest, set[tuple[int, int]]] = {}
    marks: dict[QueuedRequest, int] = {}

    def take(rows: int) -> None:
        batch = it.queue.take(rows, BUDGET)
        assert len(batch) <= rows
        widths = [each.item.cost for each in batch]
        assert len(batch) <= 1 or max(widths) * len(widths) <= 100
        taken.extend((marks[each.request], each.index) for each in batch)

    for count, step in enumerate(steps):
        if isinstance(step, int):
            take(step)
        elif step == "forget":
            for request in list(expected)[-1:]:
                left = {pair for pair in expected[request] if pair not in taken}
                it.queue.forget(request)
                expected[request] -= left
        else:
            model, lane, widths = step
            request = it.add(model, *widths, lane=lane)
            marks[request] = count
            expected[request] = {(count, index) for index in range(len(widths))}
    while it.queue.rows:
        take(5)
    assert len(taken) == len(set(taken))
    assert set(taken) == set().union(*expected.values()) if expected else not taken
    assert (it.queue._shares, it.queue._tags) == ({}, {})
    assert not any(it.queue._costs.values())
