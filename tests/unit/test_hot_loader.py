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
    encoded_image,
    promote,
    publish,
)
from tests.loading import loading
from tests.waiting import until

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
            unlooked.state(TENANT, ModelReference.parse("pets"))


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
        assert not it.watch.hears_changes


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
        live = (await it.live("pets")).trunk
        assert live is (await it.live("other")).trunk
        gone = weakref.ref(live.trunk)
        del live
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
        held = await it.live("pets")
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
        assert it.loader.current.models == {}
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
    from service.inputs import ImageInput

    async with loading(tmp_path, start=False) as it:
        publish(it.registry, add_text_trunk(it.registry))
        publish(it.registry, add_image_trunk(it.registry), "shapes", labels=("a", "b", "c"))
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@1"
        answer = await it.predict("shapes", ImageInput(encoded_image()))
        assert {label for label, _ in answer.rows[0].scores} == {"a", "b", "c"}
