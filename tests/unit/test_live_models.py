"""What is in memory: within the budget, loaded once when needed, and let go again."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Sized
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints import Checkpoints
from core.errors import NotFound, Unavailable
from core.head import Head
from core.identifiers import ModelReference
from core.manifests import OWN_TRUNK
from core.trunk import Trunk
from service import live_models, live_trunks
from service.serving_set import IndexEntry
from tests.builders import (
    TENANT,
    add_text_trunk,
    draft,
    head_files,
    promote,
    publish,
    publish_full,
    publish_low_rank,
)
from tests.loading import Loading, loading
from tests.waiting import until

pytestmark = pytest.mark.anyio


def head_bytes() -> int:
    manifest = draft(add_nothing_trunk())
    return Head(manifest, np.zeros((4, 2), np.float32), np.zeros(2, np.float32)).bytes


def add_nothing_trunk():  # type: ignore[no-untyped-def]
    from core.datasets import Modality
    from core.manifests import TrunkManifest

    return TrunkManifest(
        digest="0", backbone="b", backbone_digest="0", modality=Modality.TEXT, dim=4,
        precision="fp32", files={}, max_difference=0, created_at=0,
    )  # fmt: skip


def states(it: Loading) -> dict[str, str]:
    return {f"{entry.name}@{entry.version}": entry.state for entry in it.loader.index()}


async def test_only_as_many_as_fit_are_loaded_and_the_others_come_on_demand(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        for name in "abcde":
            publish(it.registry, trunk, name)
    async with loading(tmp_path, start=False, memory_bytes=3 * head_bytes()) as it:
        assert len(it.loader.live) == 3
        for name in "abcdeabcde":
            assert await it.serving(name) == f"{name}@1"
            assert it.loader.live.bytes <= 3 * head_bytes()
        assert [s for s, state in states(it).items() if state == "READY"] == ["c@1", "d@1", "e@1"]


async def test_those_used_longest_ago_go_first_and_pinned_ones_stay(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        for name in "abcd":
            publish(it.registry, trunk, name)
    budget = 3 * head_bytes()
    async with loading(tmp_path, start=False, memory_bytes=budget, pinned=("a",)) as it:
        for name in "abc":
            await it.live(name)
        await it.live("b")
        await it.live("d")
        assert states(it) == {"a@1": "READY", "b@1": "READY", "c@1": "UNLOADED", "d@1": "READY"}
        await it.live("c")
        assert states(it) == {"a@1": "READY", "b@1": "UNLOADED", "c@1": "READY", "d@1": "READY"}


async def test_adapters_count_and_leave_the_bank_with_their_heads(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry, adaptable=True)
        plain = publish(it.registry, trunk, "plain")
        for seed, name in enumerate("abcdefghijkl"):
            publish_low_rank(it.registry, trunk, name, seed=seed)
        await it.loader.reconcile()
        heads = {name: (await it.live(name)).head for name in (plain.name, "a")}
        size = heads["a"].bytes
        adapter = heads["a"].adapter
        assert adapter is not None
        assert size - heads["plain"].bytes == adapter.bytes == 2 * 2 * (4 * 2) * 4
    async with loading(tmp_path, start=False, memory_bytes=2 * size) as it:
        answers = {}
        for name in "abcdefghijkl" * 2:
            answer = (await it.predict(name)).rows[0]
            assert answers.setdefault(name, answer) == answer
            assert it.loader.live.bytes <= 2 * size
        bank = (await it.live("a")).trunk.trunk.bank
        # Four arrays with room for 8 at most: two, one that loads, and those on their way out.
        assert bank.bytes <= 4 * (4 * 2) * 4 * 8


async def test_a_trunk_of_a_model_s_own_counts_and_comes_and_goes_with_it(tmp_path: Path):
    """Of two tenants with the same trunk each has its own; a third model shares none either."""
    async with loading(tmp_path, start=False) as it:
        for number, name in enumerate("abc"):
            publish_full(it.registry, name, seed=number)
        other = publish_full(it.registry, "a", seed=0, tenant="other")
        shared = add_text_trunk(it.registry, seed=7)
        publish(it.registry, shared, "plain")
        await it.loader.reconcile()
        live = it.loader.live
        size = (await it.live("a@1")).bytes
        assert size > (await it.live("a@1")).head.bytes + 1_000
        assert (await it.live("plain")).bytes == (await it.live("plain")).head.bytes
        assert (await it.live("plain")).trunk is await live.trunk(shared.digest)
        theirs = await it.loader.resolve("other", ModelReference("a", 1))
        assert theirs.manifest == other
        assert theirs.trunk is not (await it.live("a@1")).trunk
        assert it.registry.newest_trunk("minilm") == shared
        with pytest.raises(NotFound):
            await live.trunk(other.trunk)
    async with loading(tmp_path, start=False, memory_bytes=2 * size) as it:
        answers = {}
        kept = weakref.WeakSet[Trunk]()
        for name in ("a@1", "b@1", "c@1") * 3:
            answer = (await it.predict(name)).rows[0]
            assert answers.setdefault(name, answer) == answer
            assert it.loader.live.bytes <= 2 * size
            kept.add((await it.live(name)).trunk.trunk)
        gc.collect()
        assert len(kept) == len(it.loader.live) == 2
        assert len(set(map(str, answers.values()))) == 3
        # The files go with the version, and so does what is loaded of them.
        it.registry.delete(TENANT, "c")
        await it.loader.reconcile()
        assert await until_gone(kept, 1)
        assert not [e for e in it.store.walk("default/models/c") if OWN_TRUNK in e.key]


async def test_many_that_come_at_once_do_not_all_lie_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, most = weakref.WeakSet[Trunk](), 0
    load = Trunk.load_for

    def count(*args: Any, **options: Any) -> Trunk:
        nonlocal most
        trunk = load(*args, **options)
        kept.add(trunk)
        gc.collect()
        most = max(most, len(kept))
        return trunk

    monkeypatch.setattr(Trunk, "load_for", count)
    names = [f"model-{number}" for number in range(8)]
    async with loading(tmp_path, start=False, memory_bytes=1) as it:
        for number, name in enumerate(names):
            publish_full(it.registry, name, seed=number)
        await it.loader.reconcile()
        await it.loader.unload(TENANT, names[-1])
        await asyncio.gather(*(it.predict(f"{name}@1") for name in names))
    # One stays, two are on their way, and as many may still answer.
    assert 1 < most <= 1 + 2 * live_models.OWN_TRUNKS_AT_ONCE


async def until_gone(kept: Sized, most: int) -> bool:
    await until(lambda: gc.collect() >= 0 and len(kept) <= most)
    return True


async def test_a_model_without_its_own_trunk_or_with_another_is_refused(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        for number, name in enumerate("ab"):
            publish_full(it.registry, name, seed=number)
        folders = [f"default/models/{name}/versions/1" for name in "ab"]
        graph = tmp_path / folders[0] / "own-trunk.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"?")
        (tmp_path / folders[1] / "own-manifest.json").unlink()
        await it.loader.reconcile()
        for name, why in (("a@1", "own-trunk.onnx does not match"), ("b@1", "missing")):
            with pytest.raises(Unavailable, match=why):
                await it.live(name)
        assert len(it.loader.live) == 0


async def test_a_budget_below_one_head_still_serves(tmp_path: Path):
    async with loading(tmp_path, start=False, memory_bytes=1) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk, "a")
        publish(it.registry, trunk, "b")
        await it.loader.reconcile()
        for name in "abab":
            assert await it.serving(name) == f"{name}@1"
            assert len(it.loader.live) == 1


async def test_a_model_that_goes_while_it_answers_ends_its_answer(tmp_path: Path):
    async with loading(tmp_path, start=False, memory_bytes=1) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk, "a")
        publish(it.registry, trunk, "b")
        await it.loader.reconcile()
        held = await it.live("a")
        await it.live("b")
        answer = await it.predictor.classify(held, ["good cat"], timeout_seconds=10)
        assert not isinstance(answer.rows[0], Exception)


async def test_however_many_ask_a_version_is_loaded_once(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        publish(it.registry, add_text_trunk(it.registry))
        publish(it.registry, add_text_trunk(it.registry), "other")
        await it.loader.reconcile()
        await it.loader.unload(TENANT, "pets")
        it.store.reads.clear()
        callers = [asyncio.create_task(it.live("pets")) for _ in range(50)]
        await asyncio.sleep(0)
        callers[0].cancel()
        live = await asyncio.gather(*callers[1:])
        assert len({id(model.head) for model in live}) == 1
        assert [key for key in it.store.reads if key.endswith("head.onnx")] == [
            "default/models/pets/versions/1/head.onnx"
        ]


async def test_a_load_that_hangs_costs_a_deadline_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from core.errors import DeadlineExceeded

    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        publish(it.registry, trunk, "other")
        await it.loader.reconcile()
        await it.loader.unload(TENANT, "pets")
        gate, load = threading.Event(), Head.load

        def slow(registry, manifest, trunk=None):  # type: ignore[no-untyped-def]
            assert gate.wait(20)
            return load(registry, manifest, trunk)

        monkeypatch.setattr(live_models.Head, "load", slow)
        with pytest.raises(DeadlineExceeded):
            await it.predict("pets", timeout=0.05)
        assert await it.serving("other") == "other@1"
        gate.set()
        assert await it.serving("pets") == "pets@1"


async def test_load_and_unload_and_what_they_answer(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        first = publish(it.registry, trunk)
        publish(it.registry, trunk)
        await it.loader.reconcile()
        assert states(it) == {"pets@1": "READY", "pets@2": "READY"}
        await it.loader.unload(TENANT, "pets", 1)
        assert states(it) == {"pets@1": "UNLOADED", "pets@2": "READY"}
        await it.loader.unload(TENANT, "pets")
        assert states(it) == {"pets@1": "UNLOADED", "pets@2": "UNLOADED"}
        await it.loader.load(TENANT, "pets")
        assert states(it) == {"pets@1": "UNLOADED", "pets@2": "READY"}
        await it.loader.load(TENANT, "pets", 1)
        promote(it.registry, first)
        await it.loader.reconcile()
        assert states(it) == {"pets@1": "READY", "pets@2": "UNLOADED"}
        for call in (it.loader.load, it.loader.unload):
            with pytest.raises(NotFound):
                await call(TENANT, "cats")
            with pytest.raises(NotFound):
                await call(TENANT, "pets", 9)
            with pytest.raises(NotFound):
                await call("other", "pets")


async def test_a_refused_version_is_tried_again_when_asked(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        publish(it.registry, trunk)
        graph = tmp_path / "default/models/pets/versions/2/head.onnx"
        sound = graph.read_bytes()
        graph.write_bytes(b"damaged")
        await it.loader.reconcile()
        assert it.loader.index()[1] == IndexEntry(
            TENANT, "pets", 2, "UNAVAILABLE", "head.onnx does not match its hash"
        )
        assert await it.serving("pets") == "pets@1"
        with pytest.raises(Unavailable, match="does not match its hash"):
            await it.loader.load(TENANT, "pets", 2)
        graph.write_bytes(sound)
        await it.loader.load(TENANT, "pets", 2)
        assert await it.serving("pets") == "pets@2"


async def test_a_version_that_is_damaged_while_it_is_out_of_memory_falls_back(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        publish(it.registry, trunk)
        await it.loader.reconcile()
        await it.loader.unload(TENANT, "pets")
        (tmp_path / "default/models/pets/versions/2/head.onnx").write_bytes(b"damaged")
        assert await it.serving("pets") == "pets@1"
        assert states(it) == {"pets@1": "READY", "pets@2": "UNAVAILABLE"}


async def test_a_checkpoint_is_served_on_demand_and_goes_with_its_model(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        job = "ftjob-" + "a" * 24
        checkpoints = Checkpoints(it.store, TENANT, job)
        saved = checkpoints.save(draft(trunk, job=job), 3, head_files(4))
        await it.loader.reconcile()
        assert saved.reference == f"pets:ckpt-{'a' * 24}-3"
        assert await it.serving(saved.reference) == saved.reference
        with pytest.raises(NotFound):
            await it.live(f"pets:ckpt-{'a' * 24}-4")
        with pytest.raises(NotFound):
            await it.live(f"other:ckpt-{'a' * 24}-3")
        assert len(it.loader.live) == 2
        await it.loader.unload(TENANT, "pets")
        assert len(it.loader.live) == 0


async def test_ten_thousand_models_cost_what_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    it = Loading(tmp_path, memory_bytes=10 * head_bytes())
    async with aclosing(it):
        source = publish(it.registry, add_text_trunk(it.registry)).name
        folder = tmp_path / "default/models"
        for number in range(10_000):
            (folder / f"m{number}").symlink_to(folder / source)
        catalogue = it.registry.catalogue(TENANT, source)[source]
        names = {source: catalogue} | {f"m{number}": catalogue for number in range(10_000)}
        monkeypatch.setattr(
            it.registry, "catalogue",
            lambda tenant, name=None: {n: c for n, c in names.items() if name in (None, n)},
        )  # fmt: skip
        it.store.reads.clear()
        await it.loader.reconcile()
        assert len(it.loader.index()) == 10_001
        assert len(it.loader.live) <= 10
        it.store.reads.clear()
        await it.loader.reconcile()
        assert it.store.reads == []


async def test_memory_is_given_back_when_the_last_head_of_a_trunk_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given_back: list[bool] = []
    monkeypatch.setattr(live_trunks, "_give_back", given_back.append)
    async with loading(tmp_path, start=False) as it:
        publish(it.registry, add_text_trunk(it.registry))
        await it.loader.reconcile()
        held = await it.live("pets")
        it.registry.delete(TENANT, "pets")
        await it.loader.reconcile()
        assert given_back == []
        del held
        await until(lambda: given_back == [True])


async def test_a_pinned_reference_needs_no_release(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        publish(it.registry, add_text_trunk(it.registry), release=False)
        await it.loader.reconcile()
        assert await it.serving("pets@1") == "pets@1"
        with pytest.raises(NotFound):
            await it.live("pets")
        assert (await it.live("pets@1")).release is None
        assert ModelReference("pets").alias == "production"
