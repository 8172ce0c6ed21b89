"""The adapter bank: every row's own deltas, whatever was loaded and unloaded before and between."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.adapter_bank import AdapterBank, BankedAdapter
from core.adapters import ROWS, Adapter, feed, input_names
from core.preprocessing import PreparedText
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import Trunk
from service.batcher import Batcher
from tests.builders import SLOTS, add_text_trunk, constant_adapter, random_adapter

RANKS = st.tuples(st.integers(0, 4), st.integers(0, 4))
STEP = st.one_of(
    st.tuples(st.just("load"), RANKS),
    st.tuples(st.just("unload"), st.integers(0, 20)),
    st.tuples(st.just("shrink"), st.just(0)),
    st.tuples(st.just("ask"), st.lists(st.integers(-2, 20), min_size=1, max_size=12)),
)


@pytest.fixture(scope="module", params=["by row", "as before"])
def trunk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    """The adaptable trunk, whose bank is the tests' to fill."""
    registry = Registry(ArtifactStore(str(tmp_path_factory.mktemp("store"))))
    by_row = request.param == "by row"
    digest = add_text_trunk(registry, adaptable=True, by_row=by_row).digest
    return Trunk.load(registry, digest, threads=1, max_pixels=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=40), st.randoms())
def test_mixed_rows_equal_unbatched_ones_whatever_was_loaded_between(trunk, steps, random):  # type: ignore[no-untyped-def]
    """Plain and adapted rows, in any order, of any ranks, asked for at once."""
    held: list[tuple[Adapter, BankedAdapter]] = []

    async def ask(batcher: Batcher, which: int) -> None:
        adapter, banked = held[which % len(held)] if held and which >= 0 else (None, None)
        row = PreparedText([random.randrange(2, 8) for _ in range(random.randrange(1, 9))])
        (features,) = await batcher.encode([row], time.monotonic() + 60, adapter=banked)
        expected = trunk.encode([row], feed(adapter, SLOTS))[0]
        assert np.abs(features - expected).max() <= 1e-5

    async def run() -> None:
        batcher = Batcher(trunk, "t", 100, trunk.bank)
        for kind, argument in steps:
            if kind == "load":
                adapter = random_adapter(random.randrange(1000), argument)
                held.append((adapter, trunk.bank.add(adapter)))
            elif kind == "unload" and held:
                held.pop(argument % len(held))
            elif kind == "shrink":
                trunk.bank.shrink()
            elif kind == "ask":
                await asyncio.gather(*(ask(batcher, which) for which in argument))
        await batcher.close()

    asyncio.run(run())


@pytest.mark.parametrize("takes_rows", [True, False])
def test_gathering_while_others_load_and_unload_gives_each_row_its_own(takes_rows: bool):
    """One thread gathers what it holds; the arrays are replaced under it all the time."""
    bank = AdapterBank(SLOTS, takes_rows=takes_rows)
    mine = {number: bank.add(constant_adapter(number)) for number in range(1, 6)}
    names = [(name, number) for number, slot in enumerate(SLOTS) for name in input_names(slot)]
    is_over, wrong = threading.Event(), []

    def gather() -> None:
        random = np.random.default_rng(0)
        while not is_over.is_set():
            numbers = random.integers(0, 6, size=8).tolist()
            deltas = bank.gather([mine.get(number) for number in numbers])
            for name, slot in names if deltas else ():
                taken = deltas[name][deltas[ROWS][slot]] if ROWS in deltas else deltas[name]
                wrong.extend(
                    n for n, array in zip(numbers, taken, strict=False) if (array != n).any()
                )

    thread = threading.Thread(target=gather)
    thread.start()
    for round_number in range(60):
        others = [bank.add(constant_adapter(100 + n)) for n in range(round_number % 20)]
        del others
        bank.shrink()
    is_over.set()
    thread.join(60)
    assert wrong == []


def test_memory_is_for_those_that_are_held_and_comes_back():
    bank = AdapterBank(SLOTS)
    held = [bank.add(random_adapter(seed)) for seed in range(100)]
    full = bank.bytes
    assert sum(each.bytes for each in held) <= full <= 3 * sum(each.bytes for each in held)
    for _ in range(90):  # as many again, never more at a time
        held.pop(0)
        held.append(bank.add(random_adapter(7)))
    assert bank.bytes == full
    held = held[10:13]  # in the lowest places
    gc.collect()
    bank.shrink()
    assert bank.bytes < full / 10
    held.clear()
    gc.collect()
    bank.shrink()
    assert bank.bytes == 0


def test_rows_of_one_model_share_the_bank_s_own_memory():
    bank = AdapterBank(SLOTS)
    one, other = bank.add(random_adapter(1)), bank.add(random_adapter(2))
    assert {array.shape[0] for array in bank.gather([one] * 5).values()} == {1}
    assert {array.shape[0] for array in bank.gather([one, other, one]).values()} == {3}
    assert bank.gather([None, None]) == {} == bank.gather([])
    partial = bank.add(random_adapter(3, (0, 2)))
    shapes = [array.shape[0] for array in bank.gather([partial, None]).values()]
    assert shapes == [1, 1, 2, 2]


def test_rows_of_several_models_are_fed_the_bank_itself():
    bank = AdapterBank(SLOTS, takes_rows=True)
    one, other = bank.add(random_adapter(1)), bank.add(random_adapter(2))
    first, second = bank.gather([one, other]), bank.gather([other, None, one])
    names = [name for slot in SLOTS for name in input_names(slot)]
    assert all(np.shares_memory(first[name], second[name]) for name in names)
    assert (first[ROWS].tolist(), second[ROWS].tolist()) == ([[1, 2]] * 2, [[2, 0, 1]] * 2)
    assert ROWS not in bank.gather([one, one])
    shorter = bank.add(random_adapter(3, (1, 2)))
    ranks = bank.gather([one, shorter])
    assert not np.shares_memory(ranks[names[0]], first[names[0]])
    assert ranks[ROWS].tolist() == [[0, 1], [1, 3]]


def test_a_trunk_without_slots_has_an_empty_bank(tmp_path: Path) -> None:
    registry = Registry(ArtifactStore(str(tmp_path)))
    plain = Trunk.load(registry, add_text_trunk(registry).digest, threads=1, max_pixels=1)
    assert plain.bank.gather([None, plain.bank.add(Adapter({}))]) == {}
