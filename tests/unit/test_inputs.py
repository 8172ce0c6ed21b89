"""Inputs that take long wait in a line: let in or refused before anything is decoded."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.errors import DeadlineExceeded, GraftError, Overloaded
from core.preprocessing import PreparedImage
from service.batcher import Batcher
from service.caller import Lane
from service.inputs import ImageInput, InputPreparer, Undecoded
from service.row_queue import QueuedRequest, Row
from tests.fakes import FakeEncoder, row
from tests.waiting import until

pytestmark = pytest.mark.anyio


class Decoding:
    """A preparer of one thread for a fake image trunk; `gate` holds what is being decoded up."""

    def __init__(self, max_queued_rows: int = 100) -> None:
        self.gate = threading.Event()
        self.decoded: list[str] = []
        self.begun = 0
        self.encoder = FakeEncoder()
        self.batcher = Batcher(self.encoder, "t", 1_000)
        self.inputs = InputPreparer(threads=1, max_text_chars=100, max_queued_rows=max_queued_rows)
        self.line = self.inputs._line
        self._trunk: Any = SimpleNamespace(
            trunk=SimpleNamespace(preprocessor=self), batcher=self.batcher
        )

    def prepare(self, data: bytes) -> PreparedImage:
        self.begun += 1
        assert self.gate.wait(30)
        self.decoded.append(data.decode().strip("."))
        return PreparedImage(np.zeros((3, 1, 1), np.float32))

    def ask(
        self, *names: str, model: str = "m", lane: Lane = Lane.NORMAL, seconds: float = 20
    ) -> asyncio.Task[list[Any]]:
        items = [ImageInput(name.encode()) for name in names]
        deadline = time.monotonic() + seconds
        return asyncio.create_task(
            self.inputs.prepare(self._trunk, items, deadline, model=model, lane=lane)
        )

    async def hold(self) -> asyncio.Task[list[Any]]:
        """One that is being decoded until the gate opens."""
        running = self.ask("first")
        await until(lambda: self.begun == 1)
        return running


async def test_a_full_line_refuses_before_decoding_and_says_when_to_come_back():
    it = Decoding(max_queued_rows=2)
    running = await it.hold()
    waiting = it.ask("a", "b")
    await until(lambda: it.line.queued_rows == 2)
    with pytest.raises(Overloaded) as refused:
        await it.ask("c")
    assert refused.value.retry_after_seconds > 0
    it.gate.set()
    await asyncio.gather(running, waiting)
    assert it.decoded == ["first", "a", "b"]


async def test_one_that_would_be_decoded_too_late_is_refused_at_once():
    it = Decoding()
    running = await it.hold()
    waiting = it.ask("a" + "." * 32_000_000)  # a second of decoding, until measured
    await until(lambda: it.line.queued_rows == 1)
    with pytest.raises(Overloaded) as refused:
        await it.ask("late", seconds=0.5)
    assert refused.value.retry_after_seconds > 0.5
    roomy = it.ask("roomy")
    it.gate.set()
    await asyncio.gather(running, waiting, roomy)
    assert it.decoded == ["first", "a", "roomy"]


async def test_one_that_would_wait_too_long_for_the_trunk_is_refused_before_decoding():
    it = Decoding()
    it.encoder.gate.clear()
    it.gate.set()
    batches = [
        asyncio.create_task(it.batcher.encode([row(n, 20_000)], time.monotonic() + 1000, model="m"))
        for n in range(2)
    ]
    await until(lambda: it.encoder.entered.is_set() and it.batcher.queued_rows == 1)
    with pytest.raises(Overloaded) as refused:
        await it.ask("late", seconds=2)
    assert refused.value.retry_after_seconds > 2
    assert it.begun == 0
    it.encoder.gate.set()
    await asyncio.gather(*batches)
    # And taken on when the trunk has nothing to do.
    await it.ask("idle", seconds=2)
    assert it.decoded == ["idle"]


async def test_a_model_and_a_lane_take_their_turns_before_decoding():
    it = Decoding()
    running = await it.hold()
    hot = it.ask(*(f"hot{n}" for n in range(20)), model="hot")
    await until(lambda: it.line.queued_rows == 20)
    cold = it.ask("cold", model="cold")
    urgent = it.ask("urgent", model="hot", lane=Lane.HIGH)
    await until(lambda: it.line.queued_rows == 22)
    it.gate.set()
    await asyncio.gather(running, hot, cold, urgent)
    assert it.decoded[1] == "urgent"
    assert it.decoded.index("cold") <= 3


async def test_a_hot_model_is_pushed_out_of_a_full_line_by_another():
    it = Decoding(max_queued_rows=3)
    running = await it.hold()
    hot = [it.ask(f"hot{n}", model="hot") for n in range(3)]
    await until(lambda: it.line.queued_rows == 3)
    cold = it.ask("cold", model="cold")
    with pytest.raises(Overloaded):
        await hot[-1]
    it.gate.set()
    await asyncio.gather(running, cold, *hot[:-1])
    assert "hot2" not in it.decoded


async def test_what_nobody_waits_for_is_not_decoded():
    it = Decoding()
    running = await it.hold()
    gone, late, stays = it.ask("gone"), it.ask("late", seconds=0.05), it.ask("stays")
    await until(lambda: it.line.queued_rows == 3)
    gone.cancel()
    with pytest.raises(DeadlineExceeded):
        await late
    it.gate.set()
    await asyncio.gather(running, stays)
    assert it.decoded == ["first", "stays"]


async def test_several_threads_share_what_waits():
    it = Decoding()
    it.inputs = InputPreparer(threads=3, max_text_chars=100, max_queued_rows=100)
    asked = it.ask(*"abcde")
    await until(lambda: it.begun == 3)
    it.gate.set()
    assert len(await asked) == 5
    assert sorted(it.decoded) == list("abcde")
    await until(lambda: it.inputs._line._working == 0)


async def test_what_decoding_takes_here_is_known_after_a_few():
    line = Decoding().line
    item = Undecoded(lambda: GraftError(""), 1_000)
    row = Row((0.0, 0), item, QueuedRequest("m", Lane.NORMAL, lambda: False), 0)
    for _ in range(6):
        line._learn([row], 0.008)
    assert line._seconds_per_cost == pytest.approx(0.008 / 1_000, rel=0.25)


async def test_close_refuses_what_waits():
    it = Decoding()
    running = await it.hold()
    waiting = it.ask("a")
    await until(lambda: it.line.queued_rows == 1)
    closing = asyncio.create_task(it.inputs.close())
    with pytest.raises(Overloaded):
        await waiting
    it.gate.set()
    (result,) = await running
    assert not isinstance(result, GraftError)
    await closing
    with pytest.raises(Overloaded):
        await it.ask("b")
