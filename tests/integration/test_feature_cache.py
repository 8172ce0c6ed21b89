"""The feature cache over a real store and trunk: what is computed anew, bounds, damage."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import DataError
from core.preprocessing import FloatArray, Prepared
from core.registry import Registry
from core.store import ArtifactStore, StoredObject
from core.trunk import Trunk
from tests.builders import TENANT, add_image_trunk, add_text_trunk
from tests.fakes import FlakyStore
from training import feature_cache
from training.feature_cache import FeatureCache

TEXTS = [f"a text of number {number}" for number in range(30)]
LARGE = 1 << 30


class Counting:
    """A real trunk that counts the rows it encodes."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self.manifest, self.preprocessor, self.dim = trunk.manifest, trunk.preprocessor, trunk.dim
        self.rows = 0

    def encode(self, rows: Sequence[Prepared]) -> FloatArray:
        self.rows += len(rows)
        return self._trunk.encode(rows)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path))


@pytest.fixture
def trunk(store: ArtifactStore) -> Counting:
    registry = Registry(store)
    digest = add_text_trunk(registry).digest
    return Counting(Trunk.load(registry, digest, threads=1, max_pixels=10**6))


def features(
    store: ArtifactStore, trunk: Counting, items: Sequence[str] | Sequence[bytes] = TEXTS,
    tenant: str = TENANT, max_bytes: int = LARGE, max_days: int = 30,
) -> FloatArray:  # fmt: skip
    cache = FeatureCache(
        store,
        tenant,
        trunk,  # type: ignore[arg-type]
        max_bytes=max_bytes,
        max_days=max_days,
    )
    return cache.extract(items, threads=2, on_progress=lambda done, total: None)


def stored(store: ArtifactStore, suffix: str) -> list[str]:
    return sorted(e.key for e in store.walk(f"{TENANT}/features") if e.key.endswith(suffix))


def test_what_is_known_is_not_computed_again(store: ArtifactStore, trunk: Counting) -> None:
    first = features(store, trunk)
    assert trunk.rows == len(TEXTS)
    again = features(store, trunk)
    assert trunk.rows == len(TEXTS)
    assert again.tobytes() == first.tobytes()


def test_of_appended_data_only_the_new_is_computed(store: ArtifactStore, trunk: Counting) -> None:
    first = features(store, trunk)
    both = features(store, trunk, ["new", *TEXTS[::-1], "also new"])
    assert trunk.rows == len(TEXTS) + 2
    assert both[1:-1].tobytes() == np.ascontiguousarray(first[::-1]).tobytes()


def test_each_distinct_item_is_computed_once(store: ArtifactStore, trunk: Counting) -> None:
    found = features(store, trunk, ["a", "b b b", "a", "a"])
    assert trunk.rows == 2
    assert (found[0] == found[2]).all()
    assert not (found[0] == found[1]).all()


def test_an_interrupted_job_goes_on_behind_its_last_block(
    store: ArtifactStore, trunk: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK_ROWS", 10)
    cache = FeatureCache(store, TENANT, trunk, max_bytes=LARGE, max_days=30)  # type: ignore[arg-type]

    def stop(done: int, total: int) -> None:
        if done > 20:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        cache.extract(TEXTS, threads=1, on_progress=stop)
    trunk.rows = 0
    features(store, trunk)
    assert trunk.rows == 10


def test_tenants_share_nothing(store: ArtifactStore, trunk: Counting) -> None:
    features(store, trunk)
    features(store, trunk, tenant="another")
    assert trunk.rows == 2 * len(TEXTS)


@pytest.mark.parametrize("name", [".keys", ".features"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_block_counts_as_absent(
    store: ArtifactStore, trunk: Counting, tmp_path: Path, name: str, damage: str
) -> None:
    expected = features(store, trunk)
    path = tmp_path / stored(store, name)[0]
    data = path.read_bytes()
    match damage:
        case "flip":
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        case "truncate":
            path.write_bytes(data[:-1])
        case "empty":
            path.write_bytes(b"")
        case _:
            path.unlink()
    assert np.allclose(features(store, trunk), expected, atol=1e-6)


def test_keys_of_another_block_do_not_pass(
    store: ArtifactStore, trunk: Counting, tmp_path: Path
) -> None:
    expected = features(store, trunk, TEXTS[:4]), features(store, trunk, TEXTS[4:8])
    one, two = (tmp_path / key for key in stored(store, ".keys"))
    one_data, two_data = one.read_bytes(), two.read_bytes()
    one.write_bytes(two_data), two.write_bytes(one_data)
    assert np.allclose(features(store, trunk, TEXTS[:4]), expected[0], atol=1e-6)
    assert np.allclose(features(store, trunk, TEXTS[4:8]), expected[1], atol=1e-6)


def test_the_oldest_blocks_go_when_there_is_no_room(store: ArtifactStore, trunk: Counting) -> None:
    block = 4 * trunk.dim * 4
    for start in range(0, 20, 4):
        features(store, trunk, TEXTS[start : start + 4], max_bytes=3 * block)
    total = sum(entry.bytes for entry in store.walk(f"{TENANT}/features"))
    assert total <= 3 * block + 32 + 16 * 4
    trunk.rows = 0
    features(store, trunk, TEXTS[16:20], max_bytes=3 * block)
    assert trunk.rows == 0
    features(store, trunk, TEXTS[:4], max_bytes=3 * block)
    assert trunk.rows == 4


def test_the_number_of_blocks_is_bounded(
    store: ArtifactStore, trunk: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "MAX_BLOCKS", 3)
    for text in TEXTS[:8]:
        features(store, trunk, [text])
    assert len(stored(store, ".keys")) == len(stored(store, ".features")) == 3


def test_a_job_lists_the_folder_once_and_stays_within_its_bounds(
    store: ArtifactStore, trunk: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK_ROWS", 2)
    monkeypatch.setattr(feature_cache, "MAX_BLOCKS", 4)
    walked: list[str] = []

    class Watched(ArtifactStore):
        def walk(self, prefix: str) -> Iterator[StoredObject]:
            walked.append(prefix)
            return super().walk(prefix)

    features(store, trunk, ["before"])
    features(Watched(str(tmp_path)), trunk)
    assert len(walked) == 1
    assert len(stored(store, ".keys")) == len(stored(store, ".features")) == 4
    trunk.rows = 0
    features(store, trunk, TEXTS[-8:])
    assert trunk.rows == 0


def test_old_blocks_go(store: ArtifactStore, trunk: Counting, tmp_path: Path) -> None:
    features(store, trunk, TEXTS[:4])
    for key in stored(store, ""):
        path = tmp_path / key
        created, _, rest = path.name.partition("-")
        path.rename(path.with_name(f"{int(created) - 3 * 86_400_000:013}-{rest}"))
    features(store, trunk, TEXTS[4:8], max_days=2)
    assert len(stored(store, ".keys")) == 1


def test_nothing_is_kept_without_room(store: ArtifactStore, trunk: Counting) -> None:
    features(store, trunk, max_bytes=0)
    features(store, trunk, max_bytes=8)
    assert stored(store, "") == []


def test_a_store_that_is_away_costs_time_only(
    store: ArtifactStore, trunk: Counting, tmp_path: Path
) -> None:
    expected = features(store, trunk, max_bytes=0)
    away = FlakyStore(str(tmp_path))
    away.is_away = True
    assert np.allclose(features(away, trunk), expected, atol=1e-6)


def test_two_workers_at_once(store: ArtifactStore, trunk: Counting) -> None:
    expected = features(store, trunk, max_bytes=0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: features(store, trunk, max_bytes=40_000), range(12)):
            assert np.allclose(found, expected, atol=1e-6)


def test_an_unreadable_image_is_named_by_its_row(store: ArtifactStore) -> None:
    registry = Registry(store)
    digest = add_image_trunk(registry).digest
    images = Counting(Trunk.load(registry, digest, threads=1, max_pixels=10**6))
    data = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(data, "PNG")
    good = data.getvalue()
    features(store, images, [good])
    with pytest.raises(DataError, match="row 3"):
        features(store, images, [good, good, b"no image"])


def test_no_items(store: ArtifactStore, trunk: Counting) -> None:
    assert features(store, trunk, []).shape == (0, trunk.dim)
