"""Shadows run unseen, and a guarded release that goes wrong is taken back once."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from core.errors import Overloaded
from core.identifiers import PRODUCTION
from core.manifests import Guard, ReleaseContent, Share
from service.metrics import SHADOW_ROWS, SIDES, SPLIT_ROWS
from service.shadow import MAX_WAITING
from tests.builders import TENANT, add_text_trunk, head_graph, publish, softmax
from tests.loading import Loading, loading
from tests.waiting import until

pytestmark = pytest.mark.anyio


def counted(outcome: str) -> float:
    return float(SHADOW_ROWS.labels(model="pets", outcome=outcome)._value.get())


def split_rows() -> Counter[tuple[str, str]]:
    return Counter(
        {
            (side, outcome): int(
                SPLIT_ROWS.labels(model="pets", side=side, outcome=outcome)._value.get()
            )
            for side in SIDES
            for outcome in ("ok", "error")
        }
    )


def always(label: int) -> dict[str, bytes]:
    """The files of a head that gives one label whatever comes."""
    weights = np.zeros((4, 2), np.float32)
    bias = np.array([5.0, -5.0] if label == 0 else [-5.0, 5.0], np.float32)
    features = np.ones((2, 4), np.float32)
    golden = save({"features": features, "probabilities": softmax(features @ weights + bias)})
    return {"head.onnx": head_graph(weights, bias), "golden.safetensors": golden}


def append(it: Loading, **content: Any) -> None:
    made = ReleaseContent(**({"aliases": {PRODUCTION: 1}} | content))
    it.registry.releases.append(TENANT, "pets", lambda _: made, created_by="me", reason="why")


async def opposites(it: Loading, other_trunk: bool = False) -> None:
    """Version 1 always says `cat`, version 2 always `dog`."""
    trunk = add_text_trunk(it.registry)
    publish(it.registry, trunk, files=always(0), release=False)
    second = add_text_trunk(it.registry, seed=1) if other_trunk else trunk
    publish(it.registry, second, files=always(1), release=False)


@pytest.mark.parametrize("other_trunk", [False, True], ids=["same trunk", "another trunk"])
async def test_a_shadow_computes_the_same_rows_and_changes_no_answer(
    tmp_path: Path, other_trunk: bool
):
    async with loading(tmp_path, start=False) as it:
        await opposites(it, other_trunk)
        append(it, shadow=2)
        await it.loader.reconcile()
        before = counted("disagreed")
        answer = await it.predict("pets", "good cat", "", "bad dog")
        assert answer.model == "pets@1"
        assert answer.rows[0].scores[0][0] == "cat"
        await until(lambda: counted("disagreed") == before + 2)
        agreed = counted("agreed")
        append(it, shadow=1, aliases={PRODUCTION: 2, "same": 2})
        await it.loader.reconcile()
        assert (await it.predict("pets@1")).rows[0].scores[0][0] == "cat"
        assert counted("agreed") == agreed


async def test_a_shadow_on_the_same_trunk_costs_no_run_of_it(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        await opposites(it)
        append(it, shadow=2)
        await it.loader.reconcile()
        live = await it.live("pets")
        before, disagreed = live.trunk.batcher._batch_rows._sum.get(), counted("disagreed")  # type: ignore[attr-defined]
        await it.predict("pets", *["good cat"] * 5)
        await until(lambda: counted("disagreed") == disagreed + 5)
        assert live.trunk.batcher._batch_rows._sum.get() == before + 5  # type: ignore[attr-defined]


async def test_a_shadow_that_overload_refuses_is_dropped_and_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async with loading(tmp_path, start=False) as it:
        await opposites(it, other_trunk=True)
        append(it, shadow=2)
        await it.loader.reconcile()

        async def refuse(*_: Any, **__: Any) -> None:
            raise Overloaded("", retry_after_seconds=1)

        monkeypatch.setattr((await it.live("pets@2")).trunk.batcher, "encode", refuse)
        dropped, failed = counted("dropped"), counted("failed")
        await it.predict("pets")
        await until(lambda: counted("dropped") == dropped + 1)
        assert counted("failed") == failed


async def test_a_shadow_that_hangs_or_fails_costs_nothing_but_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async with loading(tmp_path, start=False) as it:
        await opposites(it)
        append(it, shadow=2)
        await it.loader.reconcile()
        shadows, gate = it.predictor._shadows, asyncio.Event()
        load = shadows._load

        async def slow(slot):  # type: ignore[no-untyped-def]
            await gate.wait()
            raise RuntimeError("a bug")

        shadows._load = slow
        dropped, failed = counted("dropped"), counted("failed")
        for _ in range(MAX_WAITING + 4):
            assert (await it.predict("pets")).rows[0].scores[0][0] == "cat"
        # One is being computed, as many as may wait do, and the others are gone.
        assert counted("dropped") == dropped + 3
        gate.set()
        await until(lambda: counted("failed") == failed + MAX_WAITING + 1)
        shadows._load = load
        disagreed = counted("disagreed")
        await it.predict("pets")
        await until(lambda: counted("disagreed") == disagreed + 1)


async def test_too_much_disagreement_takes_a_guarded_release_back_once(tmp_path: Path):
    async with loading(tmp_path, start=False) as it, loading(tmp_path, start=False) as other:
        await opposites(it)
        append(it)
        append(it, shadow=2, guard=Guard(max_disagreement=0.5, min_rows=10))
        for each in (it, other):
            await each.loader.reconcile()
        for each in (it, other):
            for _ in range(10):
                await each.predict("pets")
        releases = it.registry.releases
        await until(lambda: len(releases.numbers(TENANT, "pets")) > 2)
        await until(lambda: not it.rollback._tasks and not other.rollback._tasks)
        assert releases.numbers(TENANT, "pets") == [1, 2, 3]
        made = releases.read(TENANT, "pets", 3)
        assert (made.aliases, made.shadow, made.guard) == ({PRODUCTION: 1}, None, None)
        assert made.created_by == "service"
        assert "disagreement 1.000 of version 1 in release 2 is above 0.5" in made.reason


async def test_errors_take_a_release_back_and_the_old_version_answers_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async with loading(tmp_path, start=False) as it:
        await opposites(it)
        append(it)
        append(it, aliases={PRODUCTION: 2}, guard=Guard(max_error_rate=0.1, min_rows=8))
        await it.loader.reconcile()
        bad = await it.live("pets")
        monkeypatch.setattr(bad.head, "_bias", np.full(2, np.nan, np.float32))
        for _ in range(4):
            answer = await it.predict("pets", "good cat", "bad dog")
            assert answer.model == "pets@2"
            assert "no finite" in answer.rows[0].message
        await until(lambda: len(it.registry.releases.numbers(TENANT, "pets")) == 3)
        await until(lambda: not it.rollback._tasks)
        assert await it.serving("pets") == "pets@1"


async def test_a_model_that_is_deleted_and_made_again_is_guarded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its releases are numbered from 1 again, below the one that was watched."""
    async with loading(tmp_path, start=False) as it:
        await opposites(it)
        for _ in range(4):
            append(it)
        append(it, guard=Guard(max_error_rate=0.1, min_rows=8))
        await it.loader.reconcile()
        await it.predict("pets", "good cat")
        it.registry.delete(TENANT, "pets")
        await it.loader.reconcile()
        trunk = add_text_trunk(it.registry)
        first, second = (
            publish(it.registry, trunk, files=always(label), release=False).version
            for label in (0, 1)
        )
        append(it, aliases={PRODUCTION: first})
        append(it, aliases={PRODUCTION: second}, guard=Guard(max_error_rate=0.1, min_rows=8))
        await it.loader.reconcile()
        bad = await it.live("pets")
        monkeypatch.setattr(bad.head, "_bias", np.full(2, np.nan, np.float32))
        for _ in range(4):
            await it.predict("pets", "good cat", "bad dog")
        await until(lambda: it.registry.releases.numbers(TENANT, "pets") == [1, 2, 3])


async def test_a_version_with_a_twentieth_of_the_traffic_is_judged_by_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    split = (Share(version=1, weight=95), Share(version=2, weight=5))
    async with loading(tmp_path, start=False) as it:
        await opposites(it)
        append(it)
        append(it, traffic=split, guard=Guard(max_error_rate=0.2, min_rows=40))
        await it.loader.reconcile()
        bad = await it.live("pets@2")
        monkeypatch.setattr(bad.head, "_bias", np.full(2, np.nan, np.float32))
        answered: Counter[int] = Counter()
        before = split_rows()
        while not it.rollback._tasks and answered.total() < 2_000:
            model = await it.live("pets", f"key {answered.total()}")
            # Features that the caller kept count as much as inputs that the service reads.
            await it.predictor.classify_features(model, np.ones((1, 4), np.float32))
            answered[model.manifest.version] += 1
        assert answered[2] == 40 < answered[1] / 10
        assert split_rows() - before == Counter(
            {("newest", "error"): 40, ("others", "ok"): answered[1]}
        )
        await until(lambda: not it.rollback._tasks)
        reason = it.registry.releases.read(TENANT, "pets", 3).reason
        assert "error rate 1.000 of version 2 in release 2 is above 0.2" in reason
        assert await it.serving("pets") == "pets@1"


async def test_features_are_shown_to_a_shadow_that_can_read_them(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        await opposites(it)
        append(it, shadow=2)
        await it.loader.reconcile()
        features, disagreed = np.ones((3, 4), np.float32), counted("disagreed")
        await it.predictor.classify_features(await it.live("pets"), features)
        await until(lambda: counted("disagreed") == disagreed + 3)
        # Another trunk would need the inputs.
        publish(it.registry, add_text_trunk(it.registry, seed=1), files=always(1), release=False)
        append(it, shadow=3)
        await it.loader.reconcile()
        dropped = counted("dropped")
        await it.predictor.classify_features(await it.live("pets"), features)
        await until(lambda: counted("dropped") == dropped + 3)


async def test_a_callers_own_mistakes_are_no_reason_and_neither_is_anything_without_a_guard(
    tmp_path: Path,
):
    async with loading(tmp_path, start=False) as it:
        await opposites(it)
        append(it)
        append(it, guard=Guard(max_error_rate=0.0, min_rows=2))
        await it.loader.reconcile()
        for _ in range(4):
            await it.predict("pets", "", "", "good cat")
        append(it, shadow=2)
        await it.loader.reconcile()
        disagreed = counted("disagreed")
        for _ in range(20):
            await it.predict("pets")
        await until(lambda: counted("disagreed") == disagreed + 20)
        assert not it.rollback._tasks
        assert it.registry.releases.numbers(TENANT, "pets") == [1, 2, 3]


async def test_a_person_who_was_faster_is_not_overruled(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        await opposites(it)
        append(it)
        append(it, shadow=2, guard=Guard(max_disagreement=0.5, min_rows=2))
        await it.loader.reconcile()
        append(it, aliases={PRODUCTION: 2})
        await it.predict("pets", "good cat", "bad dog")
        await until(lambda: not it.predictor._shadows._waiting.qsize())
        await until(lambda: not it.rollback._tasks)
        assert it.registry.releases.numbers(TENANT, "pets") == [1, 2, 3]
