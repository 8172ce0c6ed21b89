"""Releases: appended one behind the other, split by key, applied without what is refused."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Conflict, NotFound
from core.manifests import Release, ReleaseContent, Share
from core.registry import Registry
from core.store import ArtifactStore
from service.routing import choose_version
from tests.builders import TENANT, add_text_trunk, head_files, publish
from tests.loading import loading

pytestmark = pytest.mark.anyio


def release(*traffic: tuple[int, int], **content: object) -> Release:
    return Release(
        number=1, created_at=0, created_by="t", reason="t",
        aliases={"production": 1, "old": 9},
        traffic=tuple(Share(version=version, weight=weight) for version, weight in traffic),
        **content,
    )  # fmt: skip


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(ArtifactStore(str(tmp_path)))
    trunk = add_text_trunk(made)
    for _ in range(4):
        publish(made, trunk, release=False)
    return made


def append(registry: Registry, *, behind: int | None = None, **content: object) -> Release:
    made = ReleaseContent.model_validate({"aliases": {"production": 1}} | content)
    return registry.releases.append(
        TENANT, "pets", lambda _: made, created_by="me", reason="why", behind=behind
    )


def test_only_production_is_split():
    split = release((1, 1), (2, 1))
    assert choose_version(split, "m", "old", "k") == 9
    assert choose_version(split, "m", "nothing", "k") is None
    assert {choose_version(split, "m", "production", str(n)) for n in range(50)} == {1, 2}
    assert choose_version(release(), "m", "production", "k") == 1


def test_a_split_keeps_its_weights_and_its_keys():
    split = release((1, 90), (2, 10))
    chosen = [choose_version(split, "m", "production", f"user-{n}") for n in range(5000)]
    assert 0.07 < chosen.count(2) / len(chosen) < 0.13
    assert chosen == [choose_version(split, "m", "production", f"user-{n}") for n in range(5000)]
    other = [choose_version(split, "other", "production", f"user-{n}") for n in range(5000)]
    assert chosen != other


@given(st.text(max_size=20), st.integers(1, 99), st.integers(1, 99))
def test_a_version_that_gets_more_keeps_the_keys_it_had(key: str, some: int, more: int):
    some, more = sorted((some, more))
    before = choose_version(release((1, 100 - some), (2, some)), "m", "production", key)
    after = choose_version(release((2, more), (1, 100 - more)), "m", "production", key)
    assert before == 1 or after == 2


def test_a_release_names_only_what_is_listed(registry: Registry):
    for content in (
        {"aliases": {"production": 9}},
        {"traffic": [{"version": 9, "weight": 1}]},
        {"shadow": 9},
    ):
        with pytest.raises(NotFound, match="pets@9"):
            append(registry, **content)
    assert registry.releases.current(TENANT, "pets") is None


def test_what_a_release_names_cannot_be_deleted(registry: Registry):
    append(registry, traffic=[{"version": 2, "weight": 1}], shadow=3)
    for version in (1, 2, 3):
        with pytest.raises(Conflict):
            registry.delete(TENANT, "pets", version)
    registry.delete(TENANT, "pets", 4)


def test_of_many_who_look_at_the_same_release_one_comes_next(registry: Registry):
    append(registry)
    won: list[int] = []
    barrier = threading.Barrier(8)

    def take(version: int) -> None:
        barrier.wait()
        try:
            append(registry, behind=1, aliases={"production": version % 4 + 1})
            won.append(version)
        except Conflict:
            pass

    threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert registry.releases.numbers(TENANT, "pets") == [1, 2]


def test_without_a_claim_to_a_place_everyone_is_appended(registry: Registry):
    threads = [threading.Thread(target=append, args=(registry,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.releases.numbers(TENANT, "pets") == list(range(1, 9))


def test_a_promotion_ends_a_split(registry: Registry):
    append(registry, traffic=[{"version": 1, "weight": 1}, {"version": 2, "weight": 1}], shadow=3)
    registry.releases.alias(TENANT, "pets", {"production": 4}, created_by="t", reason="t")
    current = registry.releases.current(TENANT, "pets")
    assert current is not None
    assert (current.aliases, current.traffic, current.shadow) == ({"production": 4}, (), None)


async def test_requests_are_split_and_a_version_that_is_refused_gets_none(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        publish(it.registry, trunk)
        publish(it.registry, trunk, release=False)
        broken = head_files(4) | {"head.onnx": b"broken"}
        publish(it.registry, trunk, files=broken, release=False)
        append(it.registry, traffic=[{"version": n, "weight": 1} for n in (1, 2, 3)], shadow=3)
        await it.loader.reconcile()
        found = {key: (await it.live("pets", key)).manifest.version for key in map(str, range(40))}
        assert set(found.values()) == {1, 2}
        for key, version in found.items():
            assert (await it.live("pets", key)).manifest.version == version
        assert (await it.live("pets:production", "0")).release.shadow is None  # type: ignore[union-attr]
        assert (await it.live("pets@2")).manifest.version == 2


async def test_no_request_sees_half_a_release(tmp_path: Path):
    """While releases swap both aliases and split, each request sees those of one release."""
    import asyncio

    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry)
        for _ in range(4):
            publish(it.registry, trunk, release=False)
        pairs = ((1, 2), (3, 4))
        append(it.registry, aliases={"production": 1, "other": 2}, shadow=2)
        await it.loader.reconcile()
        ended = False

        async def ask() -> int:
            count = 0
            while not ended:
                model = await it.live("pets")
                assert model.release is not None
                pair = model.manifest.version, model.release.shadow
                assert pair in pairs
                assert model.release.aliases == {"production": pair[0], "other": pair[1]}
                count += 1
                await asyncio.sleep(0)
            return count

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        for turn in range(20):
            one, two = pairs[(turn + 1) % 2]
            append(it.registry, aliases={"production": one, "other": two}, shadow=two)
            await it.loader.reconcile_model(TENANT, "pets")
        ended = True
        assert min(await asyncio.gather(*asking)) > 20
