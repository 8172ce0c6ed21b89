"""The result cache over a real store: what is recalled, what misses, bounds, damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.datasets import Modality
from core.errors import Unavailable
from core.preprocessing import FloatArray
from core.store import ArtifactStore
from tests.builders import TENANT
from training import result_cache
from training.assessment import assess
from training.data_report import RowSet
from training.fit import Fit, fit, fit_labels, fit_ordered
from training.investigation import Investigation, investigate
from training.result_cache import ResultCache, digest_of
from training.ridge import fit_values

LARGE = 1 << 26
FEATURES = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
TARGETS = np.arange(60) % 3
calls: list[object] = []


def fit_counted(features: FloatArray, targets: np.ndarray, classes: int, seed: int) -> Fit:
    calls.append(seed)
    return fit(features, targets, classes, seed=seed)


def blank(size: int) -> Fit:
    """A fit of about `size` bytes."""
    calls.append(size)
    return replace(fit(FEATURES, TARGETS, 3, seed=0), fold_of=np.zeros(size // 8, np.int64))


def cache(store: ArtifactStore, tenant: str = TENANT, **bounds: int) -> ResultCache:
    return ResultCache(store, tenant, **({"max_bytes": LARGE, "max_days": 30} | bounds))


@pytest.fixture(autouse=True)
def _forget() -> None:
    calls.clear()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path))


def stored(store: ArtifactStore) -> list[str]:
    return [entry.key for entry in store.walk(f"{TENANT}/results")]


def fields_of(found: Fit) -> dict[str, object]:
    return {
        name: value.tobytes() + str((value.dtype, value.shape)).encode()
        if isinstance(value, np.ndarray)
        else value
        for name, value in (vars(found) | vars(found.head)).items()
        if name != "head"
    }


def test_what_is_known_comes_back_to_the_bit_and_is_not_computed_again(
    store: ArtifactStore,
) -> None:
    first = cache(store).recall(Fit, fit_counted, FEATURES, TARGETS, 3, 0)
    again = cache(store).recall(Fit, fit_counted, FEATURES.copy(), TARGETS.copy(), 3, 0)
    assert (first.is_old, again.is_old, calls) == (False, True, [0])
    assert fields_of(again.result) == fields_of(first.result)
    assert type(again.result.candidates[0]) is type(first.result.candidates[0])


@pytest.mark.parametrize(
    "changed",
    [
        (FEATURES + np.float32(1e-6), TARGETS, 3, 0),
        (FEATURES[::-1], TARGETS, 3, 0),
        (FEATURES, TARGETS[::-1], 3, 0),
        (FEATURES, TARGETS.astype(np.int32), 3, 0),
        (FEATURES, TARGETS, 4, 0),
        (FEATURES, TARGETS, 3, 1),
    ],
)
def test_a_changed_argument_misses(store: ArtifactStore, changed: tuple[Any, ...]) -> None:
    before = digest_of(fit_counted, (FEATURES, TARGETS, 3, 0))
    assert digest_of(fit_counted, changed) != before
    assert digest_of(fit_counted, (FEATURES, TARGETS, 3, 0)) == before


@dataclass(frozen=True)
class Pair:
    one: object
    two: object = None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["ab", "c"], ["a", "bc"]),
        ([b"ab", b"c"], [b"a", b"bc"]),
        ([["a"], "b"], [["a", "b"]]),
        ([1], ["1"]),
        ([1], [True]),
        ([1], [1.0]),
        ([None], [""]),
        ({"a": 1}, {"a": 2}),
        (Pair(1, 2), Pair(2, 1)),
        (Pair(np.zeros((2, 3))), Pair(np.zeros((3, 2)))),
    ],
)
def test_no_two_arguments_look_alike(one: object, other: object) -> None:
    assert digest_of(blank, [one]) != digest_of(blank, [other])


def test_another_function_recipe_or_tenant_misses(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert digest_of(blank, [8]) != digest_of(fit_counted, [8])
    cache(store).recall(Fit, blank, 80)
    cache(store, "another").recall(Fit, blank, 80)
    monkeypatch.setattr(result_cache, "_recipe", lambda: b"another release")
    cache(store).recall(Fit, blank, 80)
    assert len(calls) == 3


def test_the_recipe_follows_the_source_and_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = result_cache._recipe.__wrapped__
    before = recipe()
    assert recipe() == before
    real = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: real(path) + b"#" * (path.name == "convex.py")
    )
    assert recipe() != before
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0" if name == "torch" else "1")
    assert recipe() != before


def test_what_cannot_be_told_by_content_is_refused() -> None:
    with pytest.raises(TypeError, match="name of its own"):
        digest_of(lambda: None, [])
    with pytest.raises(TypeError, match="object"):
        digest_of(blank, [object()])


def test_fits_of_every_task_and_findings_are_kept(store: ArtifactStore) -> None:
    """Whatever a task's row may ask for can be named, written and read."""
    labels = (FEATURES[:, :4] > 0).astype(np.float32)
    values = FEATURES[:, 0].astype(np.float64)
    found = fit(FEATURES, TARGETS, 3, seed=0)
    for known in (
        found,
        fit_ordered(FEATURES, TARGETS, 3, seed=0),
        fit_labels(FEATURES, labels, TARGETS, seed=0),
        fit_values(FEATURES, values, TARGETS, seed=0),
    ):
        body = result_cache._write(Fit, known)
        read = result_cache._read(Fit, body)
        assert read is not None
        assert fields_of(read) == fields_of(known)
    rows = RowSet([f"row {n % 7}" for n in range(60)], FEATURES, [str(n) for n in TARGETS])
    judged = assess(found, TARGETS, ["0", "1", "2"], None)
    asked = (Modality.TEXT, rows, TARGETS, None, found, judged)

    def ask() -> tuple[Investigation, bool]:
        return cache(store).recall(Investigation, find, *asked)

    (new, _), (old, is_old) = ask(), ask()
    assert is_old
    assert new.seconds
    assert old == replace(new, seconds={})


def find(*given: Any) -> Investigation:
    return investigate(*given, classes=3, seed=0)


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [flip, lambda data: data[:-1], lambda _: b""])
def test_a_damaged_result_is_replaced(
    store: ArtifactStore, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cache(store).recall(Fit, blank, 80)
    path = tmp_path / stored(store)[0]
    path.write_bytes(damage(path.read_bytes()))
    assert [cache(store).recall(Fit, blank, 80).is_old for _ in range(2)] == [False, True]
    assert len(calls) == 2


def test_the_oldest_go_when_there_is_no_room(store: ArtifactStore) -> None:
    for size in (100_000, 100_008, 100_016):
        cache(store, max_bytes=250_000).recall(Fit, blank, size)
    assert sum(entry.bytes for entry in store.walk(f"{TENANT}/results")) <= 250_000
    assert cache(store).recall(Fit, blank, 100_016).is_old
    assert not cache(store).recall(Fit, blank, 100_000).is_old


def test_count_and_age_are_bounded(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_cache, "MAX_RESULTS", 2)
    for size in range(80, 120, 8):
        cache(store).recall(Fit, blank, size)
    assert len(stored(store)) == 2
    now = result_cache.time.time()
    monkeypatch.setattr(result_cache.time, "time", lambda: now + 3 * 86_400)
    cache(store, max_days=2).recall(Fit, blank, 160)
    assert len(stored(store)) == 1


def test_nothing_is_kept_where_nothing_is_to_be_or_would_fit(store: ArtifactStore) -> None:
    for most in (0, 500):
        cache(store, max_bytes=most).recall(Fit, blank, 800)
    assert stored(store) == []


def test_a_store_that_is_away_costs_the_result_only(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise Unavailable("the artifact store does not answer")

    for name in ("get", "put_new", "walk"):
        monkeypatch.setattr(store, name, away)
    assert not cache(store).recall(Fit, blank, 80).is_old
