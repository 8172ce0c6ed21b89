"""Checkpoints and training states of a job in the artifact store."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.checkpoints import KEPT_STATES, Checkpoints, parse_checkpoint
from core.errors import AlreadyExists, Conflict, NotFound
from core.identifiers import ModelReference
from core.registry import Registry
from core.store import ArtifactStore
from tests.builders import TENANT, add_text_trunk, draft, head_files

JOB = "ftjob-0123456789abcdef01234567"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path))


@pytest.fixture
def checkpoints(store: ArtifactStore) -> Checkpoints:
    return Checkpoints(store, TENANT, JOB)


def save(store: ArtifactStore, step: int, attempt: int = 1, seed: int = 0) -> str:
    trunk = add_text_trunk(Registry(store))
    model = draft(trunk, job=JOB, attempt=attempt)
    files = head_files(trunk.dim, seed=seed)
    return Checkpoints(store, TENANT, JOB).save(model, step, files).reference


def test_a_checkpoint_is_found_by_its_reference(store: ArtifactStore) -> None:
    reference = save(store, 12)
    assert reference == "pets:ckpt-0123456789abcdef01234567-12"
    registry = Registry(store)
    found = registry.resolve(TENANT, ModelReference.parse(reference))
    assert (found.job, found.step, found.reference) == (JOB, 12, reference)
    assert registry.file(found, "head.onnx") == head_files(found.dim)["head.onnx"]


def test_a_checkpoint_is_no_version(store: ArtifactStore) -> None:
    save(store, 1)
    registry = Registry(store)
    assert registry.catalogue(TENANT) == {}
    with pytest.raises(NotFound):
        registry.resolve(TENANT, ModelReference.parse("pets"))


def test_a_checkpoint_of_another_model_is_not_found(store: ArtifactStore) -> None:
    reference = save(store, 1).replace("pets", "birds")
    with pytest.raises(NotFound):
        Registry(store).resolve(TENANT, ModelReference.parse(reference))


def test_a_damaged_checkpoint_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    save(store, 1)
    (head,) = tmp_path.rglob("head.onnx")
    head.write_bytes(b"?" + head.read_bytes()[1:])
    (manifest,) = Checkpoints(store, TENANT, JOB).list()
    with pytest.raises(Conflict):
        Registry(store).file(manifest, "head.onnx")


def test_of_one_step_the_latest_attempt_counts(
    store: ArtifactStore, checkpoints: Checkpoints
) -> None:
    for step, attempt in ((3, 1), (5, 2), (5, 1), (3, 3)):
        save(store, step, attempt, seed=attempt)
    assert [(found.step, found.attempt) for found in checkpoints.list()] == [(3, 3), (5, 2)]
    assert checkpoints.get(3).attempt == 3
    with pytest.raises(AlreadyExists):
        save(store, 3, 1)


def test_one_without_manifest_is_not_listed(store: ArtifactStore, checkpoints: Checkpoints) -> None:
    store.put_new(f"{TENANT}/runs/{JOB}/checkpoints/000001-0001/head.onnx", b"half")
    assert checkpoints.list() == []
    with pytest.raises(NotFound):
        checkpoints.get(1)


def test_dropping_leaves_what_is_kept(store: ArtifactStore, checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3):
        save(store, step)
    checkpoints.drop(keep={2})
    assert [found.step for found in checkpoints.list()] == [2]
    checkpoints.drop()
    assert list(store.walk(f"{TENANT}/runs/{JOB}/checkpoints")) == []


def test_the_latest_attempts_last_state_counts(
    store: ArtifactStore, checkpoints: Checkpoints
) -> None:
    assert checkpoints.latest_state() is None
    checkpoints.save_state(1, 10, b"first")
    checkpoints.save_state(2, 4, b"second")
    # A worker whose lease was taken still writes.
    checkpoints.save_state(1, 11, b"zombie")
    assert checkpoints.latest_state() == b"second"
    checkpoints.save_state(2, 5, b"third")
    checkpoints.save_state(2, 5, b"third again")
    assert checkpoints.latest_state() == b"third"
    assert len(list(store.walk(f"{TENANT}/runs/{JOB}/state"))) == KEPT_STATES
    checkpoints.drop_states()
    assert checkpoints.latest_state() is None


@pytest.mark.parametrize("text", ["pets", "pets@3", "pets:staging", "pets:ckpt-1", "pets:ckpt-a-x"])
def test_other_references_are_no_checkpoints(text: str) -> None:
    assert parse_checkpoint(ModelReference.parse(text)) is None
