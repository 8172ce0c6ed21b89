"""The micro-batcher: every row answered once, whatever the others are and whoever goes away."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.adapter_bank import AdapterBank
from core.adapters import ROWS, Deltas, input_names
from core.errors import DeadlineExceeded, GraftError, Overloaded, PayloadTooLarge
from core.preprocessing import FloatArray, Prepared
from service.batcher import MAX_BATCH_TOKENS, Batcher
from service.caller import Lane
from service.line import MAX_BATCH_ROWS
from tests.builders import SLOTS, constant_adapter
from tests.fakes import GIVES_NAN, GIVES_TOO_FEW, RAISES, FakeEncoder, row
from tests.waiting import until

pytestmark = pytest.mark.anyio


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def answer(result: np.ndarray | GraftError) -> list[float] | str:
    return result.message if isinstance(result, GraftError) else result.tolist()


async def test_a_lone_request_is_one_run_at_once():
    encoder = FakeEncoder()
    batcher = Batcher(encoder, "t", 100)
    assert [answer(r) for r in await batcher.encode([row(7), row(8, 3)], soon())] == [
        [7, 1],
        [8, 3],
    ]
    assert encoder.batches == [[7, 8]]
    assert batcher.queued_rows == 0


async def test_no_rows_need_no_run():
    encoder = FakeEncoder()
    assert await Batcher(encoder, "t", 1).encode([], soon()) == []
    assert encoder.batches == []


async def test_rows_that_come_while_a_batch_runs_go_together():
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 100)
    first = asyncio.create_task(batcher.encode([row(1)], soon()))
    await until(encoder.entered.is_set)
    others = [asyncio.create_task(batcher.encode([row(n)], soon())) for n in range(2, 7)]
    await until(lambda: batcher.queued_rows == 5)
    encoder.gate.set()
    await asyncio.gather(first, *others)
    assert encoder.batches == [[1], [2, 3, 4, 5, 6]]


@pytest.mark.parametrize("bad", [RAISES, GIVES_TOO_FEW])
async def test_a_row_that_breaks_its_batch_fails_alone(bad: int, caplog: pytest.LogCaptureFixture):
    batcher = Batcher(FakeEncoder(), "t", 100)
    results = await batcher.encode([row(1), row(bad), row(2)], soon())
    assert answer(results[0]) == [1, 1]
    assert answer(results[1]) == "this input could not be computed"
    assert answer(results[2]) == [2, 1]
    (record,) = caplog.records
    assert record.getMessage() == "1 of a batch of 3 rows could not be computed"
    assert record.exc_info  # the answer does not tell why, so the log must


async def test_features_that_are_not_finite_are_an_error_of_their_row():
    batcher = Batcher(FakeEncoder(), "t", 100)
    results = await batcher.encode([row(GIVES_NAN), row(2)], soon())
    assert answer(results[0]) == "this input gives no finite features"
    assert answer(results[1]) == [2, 1]


class AdaptedEncoder(FakeEncoder):
    """Tells of each row which adapter it was computed with, too; 0 for none."""

    def encode(self, rows: Sequence[Prepared], deltas: Deltas | None = None) -> FloatArray:
        features = super().encode(rows)
        number = np.zeros(len(rows), np.float32)
        if deltas:
            given = deltas[input_names(SLOTS[0])[0]]
            number += (given[deltas[ROWS][0]] if ROWS in deltas else given)[:, 0, 0]
        return np.column_stack([features, number[: len(features)]])


REQUEST = st.fixed_dictionaries(
    {
        "model": st.sampled_from("abc"),
        "lane": st.sampled_from(list(Lane)),
        "adapter": st.sampled_from([0, 0, 1, 2]),
        "widths": st.lists(st.integers(1, 40), min_size=1, max_size=8),
        "bad": st.sampled_from([None, None, None, RAISES, GIVES_NAN]),
        "wait": st.integers(0, 3),
        "leaves_after": st.sampled_from([None, None, None, 0, 1, 3]),
        "may_take": st.sampled_from([20_000, 20_000, 20_000, 0, 1, 3]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(REQUEST, min_size=1, max_size=30),
    st.integers(8, 100),
    st.sampled_from([None, None, 0, 2, 4]),
)
def test_every_row_is_answered_once_in_order_with_its_own_result(plans, max_rows, closes_after):  # type: ignore[no-untyped-def]
    """Under any interleaving, with callers that leave, deadlines that pass, rows that fail, a queue
    that is full, and an end in the middle of it."""
    encoder = AdaptedEncoder()
    bank = AdapterBank(SLOTS)
    adapters = [None, bank.add(constant_adapter(1)), bank.add(constant_adapter(2))]
    computed: list[int] = []
    ended: list[str] = []

    async def ask(batcher: Batcher, first: int, plan: dict[str, Any]) -> None:
        numbers = [first + n for n in range(len(plan["widths"]))]
        if plan["bad"]:
            numbers[-1] = plan["bad"]
        rows = [row(n, width) for n, width in zip(numbers, plan["widths"], strict=True)]
        await asyncio.sleep(plan["wait"] / 1000)
        task = asyncio.create_task(
            batcher.encode(
                rows, soon(plan["may_take"] / 1000), model=plan["model"], lane=plan["lane"],
                adapter=adapters[plan["adapter"]],
            )
        )  # fmt: skip
        if plan["leaves_after"] is not None:
            await asyncio.sleep(plan["leaves_after"] / 1000)
            task.cancel()
        try:
            results = await task
        except (Overloaded, DeadlineExceeded, asyncio.CancelledError) as error:
            ended.append(type(error).__name__)
            return
        ended.append("answered")
        assert len(results) == len(numbers)
        for number, width, result in zip(numbers, plan["widths"], results, strict=True):
            if number in (RAISES, GIVES_NAN):
                assert isinstance(result, GraftError)
            else:
                assert answer(result) == [number, width, plan["adapter"]]
                computed.append(number)

    async def run() -> None:
        batcher = Batcher(encoder, "t", max_rows, bank)
        asked = [asyncio.create_task(ask(batcher, 100 * n, p)) for n, p in enumerate(plans)]
        if closes_after is not None:
            await asyncio.sleep(closes_after / 1000)
            await batcher.close()
        await asyncio.gather(*asked)
        assert batcher.queued_rows == 0
        assert not batcher._line._requests
        await batcher.close()
        assert (batcher._line._working, batcher._line._running_cost) == (0, 0)

    asyncio.run(run())
    assert len(ended) == len(plans)
    assert len(computed) == len(set(computed))
    assert all(len(batch) <= MAX_BATCH_ROWS for batch in encoder.batches)


async def test_a_request_that_would_come_too_late_is_refused_at_once():
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 100_000)
    running = asyncio.create_task(batcher.encode([row(0)], soon()))
    await until(encoder.entered.is_set)
    waiting = asyncio.create_task(batcher.encode([row(1, 50_000)], soon(1000)))
    await until(lambda: batcher.queued_rows == 1)
    with pytest.raises(Overloaded) as refused:
        await batcher.encode([row(2)], soon(2))
    wait = refused.value.retry_after_seconds
    assert wait > 2
    # So would one that is expected only just in time: it would most likely be computed in vain.
    with pytest.raises(Overloaded):
        await batcher.encode([row(2)], soon(1.1 * wait))
    # Another model's turn comes before the end of those 50,000 tokens.
    other = asyncio.create_task(batcher.encode([row(3)], soon(), model="other"))
    roomy = asyncio.create_task(batcher.encode([row(4)], soon(2 * wait)))
    await until(lambda: batcher.queued_rows == 3)
    encoder.gate.set()
    await asyncio.gather(running, waiting, other, roomy)


async def test_a_hot_model_is_pushed_out_of_a_full_queue_by_another():
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 4)
    running = asyncio.create_task(batcher.encode([row(0)], soon(), model="hot"))
    await until(encoder.entered.is_set)
    hot = [asyncio.create_task(batcher.encode([row(n)], soon(), model="hot")) for n in range(1, 5)]
    await until(lambda: batcher.queued_rows == 4)
    cold = asyncio.create_task(batcher.encode([row(9)], soon(), model="cold"))
    with pytest.raises(Overloaded):
        await hot[-1]
    encoder.gate.set()
    await asyncio.gather(running, cold, *hot[:-1])
    assert 9 in encoder.batches[1]


async def test_a_batch_is_bounded_by_rows():
    encoder = FakeEncoder()
    batcher = Batcher(encoder, "t", 1000)
    await batcher.encode([row(n) for n in range(MAX_BATCH_ROWS + 1)], soon())
    assert [len(batch) for batch in encoder.batches] == [MAX_BATCH_ROWS, 1]


async def test_a_batch_is_bounded_by_padded_tokens():
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 1000)
    tasks = [asyncio.create_task(batcher.encode([row(99)], soon()))]
    await until(encoder.entered.is_set)
    # A wider row makes its neighbours as wide: four of them fill a batch.
    wide = MAX_BATCH_TOKENS // 4
    widths = [wide, wide - 9, wide - 9, wide - 9, wide - 9, wide - 9]
    for number, width in enumerate(widths):
        tasks.append(asyncio.create_task(batcher.encode([row(number, width)], soon())))
        await until(lambda n=number: batcher.queued_rows == n + 1)
    encoder.gate.set()
    await asyncio.gather(*tasks)
    assert encoder.batches == [[99], [0, 1, 2, 3], [4, 5]]


async def test_a_row_beyond_the_budget_runs_by_itself():
    encoder = FakeEncoder()
    results = await Batcher(encoder, "t", 9).encode(
        [row(0, MAX_BATCH_TOKENS + 1), row(1), row(2)], soon()
    )
    assert [answer(each) for each in results] == [[0, MAX_BATCH_TOKENS + 1], [1, 1], [2, 1]]
    assert encoder.batches == [[1, 2], [0]]


async def test_a_full_queue_refuses_with_a_time_to_come_back():
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 3)
    running = asyncio.create_task(batcher.encode([row(0)], soon()))
    await until(encoder.entered.is_set)
    waiting = asyncio.create_task(batcher.encode([row(1), row(2)], soon()))
    await until(lambda: batcher.queued_rows == 2)
    with pytest.raises(Overloaded) as refused:
        await batcher.encode([row(3), row(4)], soon())
    assert refused.value.retry_after_seconds > 0
    assert batcher.queued_rows == 2
    encoder.gate.set()
    await asyncio.gather(running, waiting)
    assert not any(3 in batch for batch in encoder.batches)


async def test_more_rows_than_could_ever_wait_are_too_large():
    with pytest.raises(PayloadTooLarge):
        await Batcher(FakeEncoder(), "t", 3).encode([row(n) for n in range(4)], soon())


async def test_a_deadline_ends_the_wait_and_the_rows_are_never_computed():
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 100)
    running = asyncio.create_task(batcher.encode([row(0)], soon()))
    await until(encoder.entered.is_set)
    with pytest.raises(DeadlineExceeded):
        await batcher.encode([row(1)], soon(0.02))
    with pytest.raises(DeadlineExceeded):
        await batcher.encode([row(2)], soon(-1))
    encoder.gate.set()
    await running
    assert [answer(r) for r in await batcher.encode([row(3)], soon())] == [[3, 1]]
    assert encoder.batches == [[0], [3]]


async def test_rows_of_a_cancelled_caller_are_never_computed():
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 100)
    running = asyncio.create_task(batcher.encode([row(0)], soon()))
    await until(encoder.entered.is_set)
    gone = asyncio.create_task(batcher.encode([row(1), row(2)], soon()))
    stays = asyncio.create_task(batcher.encode([row(3)], soon()))
    await until(lambda: batcher.queued_rows == 3)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    encoder.gate.set()
    await asyncio.gather(running, stays)
    assert encoder.batches == [[0], [3]]


async def test_a_hanging_encoder_costs_its_callers_and_nobody_after_them():
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 100)
    with pytest.raises(DeadlineExceeded):
        await batcher.encode([row(0)], soon(0.02))
    encoder.gate.set()
    assert [answer(r) for r in await batcher.encode([row(1)], soon())] == [[1, 1]]


async def test_close_refuses_what_waits_and_answers_what_runs():
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 100)
    running = asyncio.create_task(batcher.encode([row(0)], soon()))
    await until(encoder.entered.is_set)
    waiting = asyncio.create_task(batcher.encode([row(1), row(2)], soon()))
    await until(lambda: batcher.queued_rows == 2)
    closing = asyncio.create_task(batcher.close())
    with pytest.raises(Overloaded):
        await waiting
    encoder.gate.set()
    assert [answer(r) for r in await running] == [[0, 1]]
    await closing
    with pytest.raises(Overloaded):
        await batcher.encode([row(3)], soon())
    assert encoder.batches == [[0]]


async def test_an_idle_batcher_has_no_task_and_nothing_keeps_it_alive():
    before = len(asyncio.all_tasks())
    batcher = Batcher(FakeEncoder(), "leak", 100)
    await batcher.encode([row(1)], soon())
    await until(lambda: len(asyncio.all_tasks()) == before)
    assert any(thread.name.startswith("line-leak") for thread in threading.enumerate())
    gone = weakref.ref(batcher)
    del batcher
    gc.collect()
    assert gone() is None
    await until(lambda: not any(t.name.startswith("line-leak") for t in threading.enumerate()))


async def test_rows_of_one_request_are_batched_by_length_and_answered_in_order() -> None:
    encoder = FakeEncoder()
    batcher = Batcher(encoder, "fake", 1000)
    widths = [MAX_BATCH_TOKENS // 2, 1, MAX_BATCH_TOKENS // 2, 1, 1]
    results = await batcher.encode([row(n, width) for n, width in enumerate(widths)], soon())
    assert [list(result) for result in results if not isinstance(result, GraftError)] == [
        [n, width] for n, width in enumerate(widths)
    ]
    assert encoder.batches == [[1, 3, 4], [0, 2]]
    await batcher.close()


async def test_rows_of_many_requests_get_what_they_get_alone(tmp_path: Path):
    from core.registry import Registry
    from core.store import ArtifactStore
    from core.trunk import Trunk
    from tests.builders import add_text_trunk

    registry = Registry(ArtifactStore(str(tmp_path)))
    manifest = add_text_trunk(registry)
    trunk = Trunk.load(registry, manifest.digest, threads=1, max_pixels=1)
    texts = [" ".join(["good", "bad", "cat", "dog", "red"][: n % 5 + 1] * (n % 3 + 1)) for n in
             range(40)]  # fmt: skip
    rows = [trunk.preprocessor.prepare(text) for text in texts]  # type: ignore[arg-type]
    batcher = Batcher(trunk, "real", 1000)
    found = await asyncio.gather(
        *(batcher.encode([each], soon(), model=n % 3) for n, each in enumerate(rows))
    )
    for each, (features,) in zip(rows, found, strict=True):
        assert not isinstance(features, GraftError)
        assert np.abs(features - trunk.encode([each])[0]).max() < 1e-5
    await batcher.close()


async def test_a_failure_outside_the_encoder_is_told_at_once_and_the_next_request_is_answered(
    monkeypatch: pytest.MonkeyPatch,
):
    batcher = Batcher(FakeEncoder(), "t", 100)
    queue = batcher._line._queue
    take = queue.take
    monkeypatch.setattr(queue, "take", lambda *_: 1 / 0)
    with pytest.raises(GraftError, match="could not be computed"):
        await batcher.encode([row(1)], soon())
    monkeypatch.setattr(queue, "take", take)
    (result,) = await batcher.encode([row(2)], soon())
    assert answer(result) == [2, 1]


async def test_rows_that_wait_behind_a_run_that_fails_as_a_whole_go_on(
    monkeypatch: pytest.MonkeyPatch,
):
    encoder = FakeEncoder()
    encoder.gate.clear()
    batcher = Batcher(encoder, "t", 100)
    work = batcher._line._work

    def fail_on_the_first(rows):  # type: ignore[no-untyped-def]
        results = work(rows)
        if encoder.batches == [[1]]:
            raise MemoryError
        return results

    monkeypatch.setattr(batcher._line, "_work", fail_on_the_first)
    first = asyncio.create_task(batcher.encode([row(1)], soon()))
    await until(encoder.entered.is_set)
    behind = asyncio.create_task(batcher.encode([row(2)], soon()))
    await until(lambda: batcher.queued_rows == 1)
    encoder.gate.set()
    assert answer((await first)[0]) == "this input could not be computed"
    assert answer((await behind)[0]) == [2, 1]
