"""What the hot loader refuses, and that nobody but the refused notices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from core.adapters import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from core.errors import Unavailable
from core.files import sha256
from tests.builders import (
    SLOTS,
    TENANT,
    add_text_trunk,
    draft,
    embedding,
    head_files,
    head_graph,
    low_rank,
    promote,
    publish,
    publish_low_rank,
    random_adapter,
    text_trunk,
    text_trunk_graph,
)
from tests.loading import loading
from training.novelty import estimate_novelty

pytestmark = pytest.mark.anyio


def versions(it, name: str = "pets") -> list[int]:  # type: ignore[no-untyped-def]
    state = it.loader.current.models.get((TENANT, name))
    return sorted(state.versions) if state else []


def refused(it, name: str = "pets") -> dict[int, str]:  # type: ignore[no-untyped-def]
    return dict(it.loader.current.models[TENANT, name].refused)


def truncated(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"head.onnx": files["head.onnx"][:40]}


def garbage(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"head.onnx": b"not a graph"}


def wrong_dim(files: dict[str, bytes]) -> dict[str, bytes]:
    return head_files(9, 2)


def wrong_classes(files: dict[str, bytes]) -> dict[str, bytes]:
    return head_files(4, 3)


def disagreeing(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"golden.safetensors": head_files(4, 2, seed=9)["golden.safetensors"]}


def gives_nan(files: dict[str, bytes]) -> dict[str, bytes]:
    weights = np.full((4, 2), np.nan, np.float32)
    graph = head_graph(weights, np.zeros(2, np.float32))
    nan = np.full((3, 2), np.nan, np.float32)
    return {
        "head.onnx": graph,
        "golden.safetensors": safetensors.numpy.save(
            {"features": np.ones((3, 4), np.float32), "probabilities": nan}
        ),
    }


def without_golden(files: dict[str, bytes]) -> dict[str, bytes]:
    return {"head.onnx": files["head.onnx"]}


def novelty(**changed: np.ndarray) -> dict[str, bytes]:
    sound = estimate_novelty(
        np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32), np.arange(40) % 2, 2,
        seed=0,
    )  # fmt: skip
    return {"novelty.safetensors": replace(sound, **changed).write()}


def garbage_novelty(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"novelty.safetensors": b"not tensors"}


def truncated_novelty(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"novelty.safetensors": novelty()["novelty.safetensors"][:-40]}


def nan_novelty(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | novelty(scale=np.full(4, np.nan, np.float32))


def novelty_of_another_model(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | novelty(scale=np.ones(9, np.float32))


BREAKAGES = [
    truncated, garbage, wrong_dim, wrong_classes, disagreeing, gives_nan, without_golden,
    garbage_novelty, truncated_novelty, nan_novelty, novelty_of_another_model,
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


def cut_adapter(files: dict[str, bytes]) -> dict[str, bytes]:
    return {WEIGHTS_FILE: files[WEIGHTS_FILE][:-8]}


def garbage_adapter(files: dict[str, bytes]) -> dict[str, bytes]:
    return {WEIGHTS_FILE: b"not tensors"}


def adapter_of_another_model(files: dict[str, bytes]) -> dict[str, bytes]:
    return {WEIGHTS_FILE: write_adapter(random_adapter(9), SLOTS, "minilm")[WEIGHTS_FILE]}


def garbage_config(files: dict[str, bytes]) -> dict[str, bytes]:
    return {CONFIG_FILE: b"{}"}


def nan_adapter(files: dict[str, bytes]) -> dict[str, bytes]:
    tensors = {k: v * np.nan for k, v in safetensors.numpy.load(files[WEIGHTS_FILE]).items()}
    return {WEIGHTS_FILE: safetensors.numpy.save(tensors)}


ADAPTER_BREAKAGES = [
    cut_adapter, garbage_adapter, adapter_of_another_model, garbage_config, nan_adapter
]  # fmt: skip


@pytest.mark.parametrize("breakage", ADAPTER_BREAKAGES)
async def test_a_damaged_adapter_is_refused_and_the_last_good_one_serves_on(
    tmp_path: Path,
    breakage,  # type: ignore[no-untyped-def]
):
    async with loading(tmp_path, start=False) as it:
        trunk = add_text_trunk(it.registry, adaptable=True)
        publish_low_rank(it.registry, trunk, seed=1)
        await it.loader.reconcile()
        good = await it.predict("pets")
        made, files = low_rank(it.registry, trunk, seed=2)
        promote(it.registry, it.registry.publish(made, files | breakage(files)))
        await it.loader.reconcile()
        assert list(refused(it)) == [2]
        assert "/" not in refused(it)[2]
        answer = await it.predict("pets")
        assert (answer.model, answer.rows[0].scores) == ("pets@1", good.rows[0].scores)


async def test_a_trunk_that_gives_nan_refuses_its_versions_only(tmp_path: Path):
    async with loading(tmp_path, start=False) as it:
        manifest, files = text_trunk()
        files["trunk.onnx"] = text_trunk_graph(np.full_like(embedding(0), np.nan))
        golden = safetensors.numpy.load(files["golden.safetensors"])
        golden["features"] = np.full_like(golden["features"], np.nan)
        files["golden.safetensors"] = safetensors.numpy.save(golden)
        hashes = {name: sha256(data) for name, data in files.items()}
        bad = manifest.model_copy(update={"files": hashes, "digest": "f" * 64})
        publish(it.registry, it.registry.add_trunk("bad", bad, files), "broken")
        publish(it.registry, add_text_trunk(it.registry))
        await it.loader.reconcile()
        assert await it.serving("pets") == "pets@1"
        assert refused(it, "broken") == {1: "trunk ffffffffffff does not reproduce its golden rows"}


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
        (tmp_path / "default/models/pets/versions/1/golden.safetensors").unlink()
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
