"""The registry: numbers taken once, versions listed whole, releases that build on each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.errors import AlreadyExists, Conflict, NotFound
from core.identifiers import ModelReference
from core.manifests import ModelManifest, TrunkManifest
from core.registry import Listing, Registry
from core.store import ArtifactStore
from tests.builders import TENANT, add_text_trunk, draft, head_files, promote, publish

FILES = {"head.onnx": b"head", "golden.safetensors": b"golden"}


class CrashingStore(ArtifactStore):
    """A store whose process dies just before one write."""

    before = ""

    def put_new(self, key: str, data: bytes) -> None:
        if self.before and key.endswith(self.before):
            raise KeyboardInterrupt
        super().put_new(key, data)


@pytest.fixture
def store(tmp_path: Path) -> CrashingStore:
    return CrashingStore(str(tmp_path))


@pytest.fixture
def registry(store: CrashingStore) -> Registry:
    return Registry(store)


@pytest.fixture
def trunk(registry: Registry) -> TrunkManifest:
    return add_text_trunk(registry)


def numbers(registry: Registry, name: str = "pets") -> list[int]:
    return registry.versions(TENANT, name)


def test_a_published_version_is_listed_and_its_files_are_checked(
    registry: Registry, trunk: TrunkManifest, tmp_path: Path
):
    manifest = registry.publish(draft(trunk), FILES)
    assert manifest.reference == "pets@1"
    assert registry.manifest(TENANT, "pets", 1) == manifest
    assert registry.file(manifest, "head.onnx") == b"head"
    (tmp_path / "default/models/pets/versions/1/head.onnx").write_bytes(b"hEad")
    with pytest.raises(Conflict, match=r"^head\.onnx does not match its hash$"):
        registry.file(manifest, "head.onnx")


def test_a_job_publishes_once_whatever_its_attempts_do(registry: Registry, trunk: TrunkManifest):
    first = registry.publish(draft(trunk, attempt=1), FILES)
    again = registry.publish(draft(trunk, attempt=2), FILES)
    assert again == first
    assert numbers(registry) == [1]


def test_two_attempts_at_once_list_one_version(registry: Registry, trunk: TrunkManifest):
    start = threading.Barrier(8)

    def attempt(number: int) -> ModelManifest:
        start.wait(10)
        return registry.publish(draft(trunk, attempt=1), FILES)

    with ThreadPoolExecutor(8) as pool:
        found = {manifest.version for manifest in pool.map(attempt, range(8))}
    assert len(found) == 1
    assert numbers(registry) == sorted(found)


def test_a_zombie_attempt_is_refused(registry: Registry, trunk: TrunkManifest):
    registry.publish(draft(trunk, attempt=2), FILES)
    with pytest.raises(AlreadyExists):
        registry.publish(draft(trunk, attempt=1), FILES)
    assert numbers(registry) == [1]


def test_jobs_that_publish_one_name_at_once_get_a_version_each(
    registry: Registry, trunk: TrunkManifest
):
    start = threading.Barrier(16)

    def run(number: int) -> int:
        start.wait(10)
        return registry.publish(draft(trunk, job=f"ftjob-{number}"), FILES).version

    with ThreadPoolExecutor(16) as pool:
        found = sorted(pool.map(run, range(16)))
    assert found == numbers(registry) == list(range(1, 17))


@pytest.mark.parametrize("before", ["golden.safetensors", "publication-1.json"])
def test_a_crash_before_the_decision_lists_nothing(
    registry: Registry, store: CrashingStore, trunk: TrunkManifest, before: str
):
    store.before = before
    with pytest.raises(KeyboardInterrupt):
        registry.publish(draft(trunk), FILES)
    store.before = ""
    assert registry.catalogue(TENANT) == {}
    assert registry.publication(TENANT, "ftjob-1") is None
    with pytest.raises(NotFound):
        registry.manifest(TENANT, "pets", 1)
    # The next attempt does not reuse the number: what lies there is not its own.
    assert registry.publish(draft(trunk, attempt=2), FILES).version == 2
    assert numbers(registry) == [2]


def test_a_crash_between_the_decision_and_the_listing_is_rolled_forward(
    registry: Registry, store: CrashingStore, trunk: TrunkManifest
):
    store.before = "versions/1/manifest.json"
    with pytest.raises(KeyboardInterrupt):
        registry.publish(draft(trunk), FILES)
    store.before = ""
    assert numbers(registry) == []
    decided = registry.publication(TENANT, "ftjob-1")
    assert decided is not None
    assert registry.publish(draft(trunk, attempt=2), {"other": b"!"}) == decided
    assert numbers(registry) == [1]
    assert registry.file(decided, "head.onnx") == b"head"


def test_numbers_are_never_used_again(registry: Registry, trunk: TrunkManifest):
    for expected in (1, 2, 3):
        assert publish(registry, trunk, files=FILES).version == expected
        if expected == 2:
            assert registry.delete(TENANT, "pets") == [1, 2]
    registry.delete(TENANT, "pets")
    assert publish(registry, trunk, files=FILES).version == 4
    assert registry.catalogue(TENANT) == {"pets": Listing((4,), 1)}


def test_deleting_a_version(registry: Registry, trunk: TrunkManifest, tmp_path: Path):
    for _ in range(11):
        publish(registry, trunk, files=FILES)
    with pytest.raises(Conflict):
        registry.delete(TENANT, "pets", 11)
    assert registry.delete(TENANT, "pets", 1) == [1]
    assert numbers(registry) == list(range(2, 12))
    left = [path.name for path in (tmp_path / "default/models/pets/versions/1").iterdir()]
    assert left == ["deleted.json"]
    with pytest.raises(NotFound):
        registry.delete(TENANT, "pets", 1)
    with pytest.raises(NotFound):
        registry.delete(TENANT, "cats")
    assert registry.file(registry.manifest(TENANT, "pets", 10), "head.onnx") == b"head"


def test_the_only_version_is_not_deleted_by_its_number_while_it_is_released(
    registry: Registry, trunk: TrunkManifest
):
    publish(registry, trunk, files=FILES)
    with pytest.raises(Conflict):
        registry.delete(TENANT, "pets", 1)
    assert registry.catalogue(TENANT) == {"pets": Listing((1,), 1)}


def test_deleting_a_model_leaves_its_neighbours(registry: Registry, trunk: TrunkManifest):
    publish(registry, trunk, "pets", files=FILES)
    publish(registry, trunk, "pets-2", files=FILES)
    registry.delete(TENANT, "pets")
    assert registry.catalogue(TENANT) == {"pets-2": Listing((1,), 1)}
    assert registry.catalogue(TENANT, "pets") == {}
    assert registry.releases.current(TENANT, "pets") is None


def test_a_deleted_version_is_not_rolled_forward(registry: Registry, trunk: TrunkManifest):
    manifest = publish(registry, trunk, files=FILES, job="ftjob-9")
    registry.delete(TENANT, "pets")
    registry.roll_forward(manifest)
    registry.publish(draft(trunk, job="ftjob-9", attempt=2), FILES)
    assert registry.catalogue(TENANT) == {}


def test_a_roll_forward_that_crosses_a_delete_lists_nothing(
    registry: Registry, store: CrashingStore, trunk: TrunkManifest
):
    publish(registry, trunk, files=FILES)
    registry.delete(TENANT, "pets")
    store.put_new("default/models/pets/versions/1/manifest.json", b"{}")
    assert registry.catalogue(TENANT) == {}


def test_releases_are_numbered_and_build_on_each_other(registry: Registry, trunk: TrunkManifest):
    one = publish(registry, trunk, files=FILES)
    two = publish(registry, trunk, files=FILES, release=False)
    release = promote(registry, two, "staging")
    assert release.number == 2
    assert release.aliases == {"production": 1, "staging": 2}
    assert promote(registry, two).aliases == {"production": 2, "staging": 2}
    assert promote(registry, one).number == 4
    assert registry.releases.read(TENANT, "pets", 1).aliases == {"production": 1}
    with pytest.raises(NotFound):
        registry.releases.alias(TENANT, "pets", {"production": 9}, created_by="t", reason="t")


def production(registry: Registry) -> int:
    current = registry.releases.current(TENANT, "pets")
    return current.aliases["production"] if current else 0


def test_a_version_is_promoted_once_and_never_in_place_of_a_later_one(
    registry: Registry, trunk: TrunkManifest
):
    def again(manifest: ModelManifest) -> int:
        registry.releases.promote(manifest, created_by="t", reason="t")
        return production(registry)

    one, two, three = (publish(registry, trunk, files=FILES, release=False) for _ in range(3))
    assert [again(two), again(one), again(three)] == [2, 2, 3]
    promote(registry, one)
    assert again(three) == 1, "a rollback stands"
    four = publish(registry, trunk, files=FILES, release=False)
    promote(registry, one, "staging")
    assert again(four) == 4
    with pytest.raises(NotFound):
        again(four.model_copy(update={"version": 5}))


def test_releases_at_once_lose_none(registry: Registry, trunk: TrunkManifest):
    manifest = publish(registry, trunk, files=FILES, release=False)
    start = threading.Barrier(12)

    def release(number: int) -> int:
        start.wait(10)
        return promote(registry, manifest, f"alias-{number}").number

    with ThreadPoolExecutor(12) as pool:
        assert sorted(pool.map(release, range(12))) == list(range(1, 13))
    current = registry.releases.current(TENANT, "pets")
    assert current is not None
    assert current.aliases == {f"alias-{n}": 1 for n in range(12)}


@pytest.mark.parametrize(
    ("reference", "version"), [("pets", 2), ("pets@1", 1), ("pets:old", 1), ("pets@2", 2)]
)
def test_references_resolve(registry: Registry, trunk: TrunkManifest, reference: str, version: int):
    promote(registry, publish(registry, trunk, files=FILES), "old")
    publish(registry, trunk, files=FILES)
    found = registry.resolve(TENANT, ModelReference.parse(reference))
    assert found.version == version


@pytest.mark.parametrize("reference", ["cats", "pets:nothing", "pets@2"])
def test_unknown_references_are_not_found(registry: Registry, trunk: TrunkManifest, reference: str):
    publish(registry, trunk, files=FILES)
    with pytest.raises(NotFound):
        registry.resolve(TENANT, ModelReference.parse(reference))
    with pytest.raises(NotFound):
        registry.resolve("other", ModelReference.parse("pets"))


def test_a_trunk_is_stored_once_and_found_by_its_key(registry: Registry, store: CrashingStore):
    manifest = add_text_trunk(registry)
    assert add_text_trunk(registry) == manifest
    assert registry.find_trunk(f"test-{manifest.digest[:12]}") == manifest
    assert registry.find_trunk("unknown") is None
    with pytest.raises(NotFound):
        registry.trunk("unknown")


def test_the_first_trunk_under_a_key_stays(registry: Registry):
    first, second = add_text_trunk(registry, 0), add_text_trunk(registry, 1)
    key = f"test-{first.digest[:12]}"
    assert registry.add_trunk(key, second, {}) == first


def test_tenants_are_those_with_something_in_the_store(
    registry: Registry, trunk: TrunkManifest, tmp_path: Path
):
    assert registry.tenants() == []
    publish(registry, trunk, files=head_files(4))
    (tmp_path / "lost+found/x").mkdir(parents=True)
    (tmp_path / ".cache/x").mkdir(parents=True)
    assert registry.tenants() == [TENANT]
