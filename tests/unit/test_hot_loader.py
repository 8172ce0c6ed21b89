"""The hot loader: whatever appears in the registry, sound versions are served and no others."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from pathlib import Path

import numpy as np
import pytest

from core.errors import NotFound, Unavailable
from core.identifiers import ModelReference
from tests.builders import (
    TENANT,
    add_image_trunk,
    add_text_trunk,
    draft,
    encoded_image,
    head_files,
    head_graph,
    npz,
    promote,
    publish,
)
from tests.loading import loading, until

pytestmark = pytest.mark.anyio


def versions(it, name: str = "pets") -> list[int]:  # type: ignore[no-untyped-def]
    state = it.loader.current.models.get((TENANT, name))
    return sorted(state.versions) if state else []


def refused(it, name: str = "pets") -> dict[int, str]:  # type: ignore[no-untyped-def]
    return dict(it.loader.current.models[TENANT, name].refused)


async def test_an_empty_registry_is_complete(tmp_path: Path):
    async with loading(tmp_path) as it:
        assert it.loader.current.is_complete
        with pytest.raises(NotFound):
            await it.predict("pets")


async def test_what_was_published_before_the_start_is_served(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
    async with loading(tmp_path) as it:
        assert await it.serving("pets") == "pets@1"


async def test_before_the_first_look_a_model_is_unavailable_not_unknown(tmp_path: Path):
    async with loading(tmp_path) as it:
        unlooked = type(it.loader.current)()
        with pytest.raises(Unavailable):
            unlooked.resolve(TENANT, ModelReference.parse("pets"))


async def test_a_published_version_is_served_when_the_feed_tells(tmp_path: Path):
    async with loading(tmp_path) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        await it.tell()
        await until(lambda: versions(it) == [1])
        assert await it.serving("pets") == "pets@1"
        publish(it.registry, trunk, seed=1)
        await it.tell()
        await until(lambda: versions(it) == [1, 2])
        assert await it.serving("pets") == "pets@2"
        assert await it.serving("pets@1") == "pets@1"


async def test_a_lost_event_is_found_by_the_poll(tmp_path: Path):
    async with loading(tmp_path, deaf=True, poll=0.02) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        await until(lambda: versions(it) == [1])
        assert not it.loader.hears_changes


async def test_a_release_moves_the_alias(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        first = publish(it.registry, trunk)
        publish(it.registry, trunk)
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@2"
        promote(it.registry, first)
        promote(it.registry, first, "staging")
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@1"
        assert await it.serving("pets:staging") == "pets@1"
        with pytest.raises(NotFound):
            await it.predict("pets:canary")


def truncated(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"head.onnx": files["head.onnx"][:40]}


def garbage(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"head.onnx": b"not a graph"}


def wrong_dim(files: dict[str, bytes]) -> dict[str, bytes]:
    return head_files(9, 2)


def wrong_classes(files: dict[str, bytes]) -> dict[str, bytes]:
    return head_files(4, 3)


def disagreeing(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"golden.npz": head_files(4, 2, seed=9)["golden.npz"]}


def gives_nan(files: dict[str, bytes]) -> dict[str, bytes]:
    weights = np.full((4, 2), np.nan, np.float32)
    graph = head_graph(weights, np.zeros(2, np.float32))
    nan = np.full((3, 2), np.nan, np.float32)
    return {
        "head.onnx": graph,
        "golden.npz": npz(features=np.ones((3, 4), np.float32), probabilities=nan),
    }


def without_golden(files: dict[str, bytes]) -> dict[str, bytes]:
    return {"head.onnx": files["head.onnx"]}


BREAKAGES = [
    truncated, garbage, wrong_dim, wrong_classes, disagreeing, gives_nan, without_golden,
]  # fmt: skip


@pytest.mark.parametrize("breakage", BREAKAGES)
async def test_a_bad_version_is_refused_and_the_last_good_one_serves_on_even_after_a_restart(
    tmp_path: Path,
    breakage,  # type: ignore[no-untyped-def]
):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        publish(it.registry, trunk, "other")
        await it.loader.reconcile()
        publish(it.registry, trunk, files=breakage(head_files(4, 2)))
        publish(it.registry, trunk, "zebra")
        await it.loader.reconcile()
        assert versions(it) == [1]
        assert list(refused(it)) == [2]
        assert "/" not in refused(it)[2]
        assert await it.serving("pets") == "pets@1"
        assert await it.serving("other") == "other@1"
        assert await it.serving("zebra") == "zebra@1"
        with pytest.raises(Unavailable):
            await it.predict("pets@2")
    async with loading(tmp_path) as it:
        assert await it.serving("pets") == "pets@1"
        assert list(refused(it)) == [2]


async def test_a_flipped_bit_is_found_by_the_hash(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        graph = tmp_path / "default/models/pets/versions/1/head.onnx"
        data = bytearray(graph.read_bytes())
        data[len(data) // 2] ^= 1
        graph.write_bytes(bytes(data))
        await it.loader.reconcile()
        assert refused(it) == {1: "head.onnx does not match its hash"}


async def test_a_missing_file_is_refused_with_its_reason(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        (tmp_path / "default/models/pets/versions/1/golden.npz").unlink()
        await it.loader.reconcile()
        assert refused(it) == {1: "one of its files is missing"}


async def test_a_broken_trunk_refuses_its_versions_only(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        good, bad = add_text_trunk(it.registry, 0), add_text_trunk(it.registry, 1)
        publish(it.registry, bad, "broken")
        publish(it.registry, good)
        (tmp_path / f"trunks/{bad.digest}/trunk.onnx").write_bytes(b"nonsense")
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@1"
        assert refused(it, "broken") == {1: "trunk.onnx does not match its hash"}


async def test_a_head_that_does_not_fit_its_trunk_is_refused(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        it.registry.publish(draft(trunk).model_copy(update={"dim": 9}), head_files(9, 2))
        await it.loader.reconcile()
        assert refused(it) == {1: "pets@1 does not fit its trunk"}


async def test_a_refused_version_is_not_tried_again_at_each_poll(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk, files=garbage(head_files(4, 2)))
        await it.loader.reconcile()
        it.store.reads.clear()
        for _ in range(3):
            await it.loader.reconcile()
        assert it.store.reads == []
        publish(it.registry, trunk)
        await it.loader.reconcile()
        assert versions(it) == [2]
        assert not any("versions/1/" in key for key in it.store.reads)


@pytest.mark.parametrize("damage", ["{}", "not json", ""])
async def test_a_damaged_release_is_passed_over_and_blocks_nobody(tmp_path: Path, damage: str):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        publish(it.registry, trunk, release=False)
        publish(it.registry, trunk, "zebra")
        it.store.put_new("default/models/pets/releases/2.json", damage.encode())
        await it.loader.reconcile()
        assert it.loader.current.is_complete
        assert await it.serving("pets") == "pets@1"
        assert await it.serving("zebra") == "zebra@1"


async def test_a_damaged_manifest_blocks_nobody(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        publish(it.registry, trunk, "zebra")
        it.store.put_new("default/models/pets/versions/7/manifest.json", b'{"format": "graft-9"}')
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@1"
        assert await it.serving("zebra") == "zebra@1"
        assert refused(it) == {7: "it does not load"}


async def test_stray_files_are_passed_over(tmp_path: Path):
    (tmp_path / "lost+found/models/x/versions/1").mkdir(parents=True)
    (tmp_path / "lost+found/models/x/versions/1/manifest.json").write_text("?")
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        it.store.put_new("default/models/pets/releases/1.json~", b"?")
        it.store.put_new("default/models/pets/releases/.DS_Store", b"?")
        it.store.put_new("default/models/pets/versions/tmp/manifest.json", b"?")
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@1"
        publish(it.registry, trunk)
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@2"


async def test_a_deleted_version_and_a_deleted_model_go(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        publish(it.registry, trunk)
        await it.loader.reconcile()
        it.registry.delete(TENANT, "pets", 1)
        await it.loader.reconcile()
        assert versions(it) == [2]
        with pytest.raises(NotFound):
            await it.predict("pets@1")
        it.registry.delete(TENANT, "pets")
        await it.loader.reconcile()
        assert it.loader.current.models == {}
        with pytest.raises(NotFound):
            await it.predict("pets")


async def test_a_trunk_is_shared_and_freed_when_the_last_version_has_gone(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        publish(it.registry, trunk, "other")
        await it.loader.reconcile()
        models = it.loader.current.models
        live = models[TENANT, "pets"].versions[1].trunk
        assert live is models[TENANT, "other"].versions[1].trunk
        gone = weakref.ref(live.trunk)
        del models, live
        it.registry.delete(TENANT, "pets")
        await it.loader.reconcile()
        assert gone() is not None
        it.registry.delete(TENANT, "other")
        await it.loader.reconcile()
        gc.collect()
        assert gone() is None


async def test_a_request_that_holds_the_old_set_is_answered_after_the_swap(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        await it.loader.reconcile()
        held = it.loader.current.resolve(TENANT, ModelReference.parse("pets"))
        it.registry.delete(TENANT, "pets")
        await it.loader.reconcile()
        prepared = held.trunk.trunk.preprocessor.prepare("good cat")  # type: ignore[arg-type]
        deadline = asyncio.get_running_loop().time() + 10
        (features,) = await held.trunk.batcher.encode([prepared], deadline)
        assert not isinstance(features, Exception)
        assert held.head.predict(np.stack([features])).shape == (1, 2)


async def test_without_the_store_the_last_set_serves_on_and_the_loader_recovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async with loading(tmp_path, poll=0.02) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        await until(lambda: versions(it) == [1])
        with caplog.at_level(logging.WARNING):
            it.store.is_away = True
            await until(lambda: "the artifact store does not answer" in caplog.text)
        assert await it.serving("pets") == "pets@1"
        it.store.is_away = False
        publish(it.registry, trunk)
        await until(lambda: versions(it) == [1, 2])


async def test_a_store_that_goes_away_in_the_middle_of_a_load_refuses_nothing(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        get = it.store.get

        def gone(key: str) -> bytes:
            if key.endswith("head.onnx"):
                raise Unavailable("the artifact store does not answer")
            return get(key)

        it.store.get = gone  # type: ignore[method-assign]
        with pytest.raises(Unavailable):
            await it.loader.reconcile()
        assert not it.loader.current.is_complete
        it.store.get = get  # type: ignore[method-assign]
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@1"
        assert refused(it) == {}


async def test_an_older_listing_never_replaces_a_newer_one(tmp_path: Path):
    """A poll lists the registry, an event brings version 2, then the poll goes on."""
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        catalogue = it.registry.catalogue
        loop = asyncio.get_running_loop()

        def listed_then_overtaken(tenant: str, name: str | None = None):  # type: ignore[no-untyped-def]
            answer = catalogue(tenant, name)
            if name is None:
                it.registry.catalogue = catalogue  # type: ignore[method-assign]
                publish(it.registry, trunk)
                asyncio.run_coroutine_threadsafe(
                    it.loader.reconcile_model(TENANT, "pets"), loop
                ).result(10)
            return answer

        it.registry.catalogue = listed_then_overtaken  # type: ignore[method-assign]
        await it.loader.reconcile()
        assert versions(it) == [1, 2]
        assert await it.serving("pets") == "pets@2"


async def test_text_and_image_models_side_by_side(tmp_path: Path):
    from service.predictor import ImageInput

    async with loading(tmp_path, start=False) as it:
        publish(it.registry, add_text_trunk(it.registry))
        publish(it.registry, add_image_trunk(it.registry), "shapes", labels=("a", "b", "c"))
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@1"
        answer = await it.predict("shapes", ImageInput(encoded_image()))
        assert {label for label, _ in answer.rows[0].scores} == {"a", "b", "c"}
