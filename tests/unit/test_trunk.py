"""Trunks and heads: what is run is what was exported, row by row, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from core.datasets import Modality
from core.errors import Conflict, NotFound
from core.head import Head
from core.manifests import TrunkManifest
from core.preprocessing import PreparedText
from core.registry import Registry
from core.store import ArtifactStore
from core.trunk import TOLERANCE, Trunk, require_equal, tolerance
from tests.builders import (
    add_image_trunk,
    add_text_trunk,
    embedding,
    encoded_image,
    publish,
    text_features,
)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(ArtifactStore(str(tmp_path)))


def load(registry: Registry, manifest: TrunkManifest) -> Trunk:
    return Trunk.load(registry, manifest.digest, threads=1, max_pixels=10_000)


def test_a_text_trunk_pads_and_masks(registry: Registry):
    trunk = load(registry, add_text_trunk(registry))
    rows = [[2], [3, 4, 5, 6], [7, 7]]
    features = trunk.encode([PreparedText(ids) for ids in rows])
    assert features.dtype == np.float32
    assert np.allclose(features, [text_features(embedding(0), ids) for ids in rows], atol=1e-6)
    assert (trunk.dim, trunk.modality) == (4, Modality.TEXT)


def test_a_row_does_not_depend_on_its_neighbours(registry: Registry):
    trunk = load(registry, add_text_trunk(registry))
    alone = trunk.encode([PreparedText([2, 6])])[0]
    among = trunk.encode([PreparedText([3] * 9), PreparedText([2, 6]), PreparedText([4])])[1]
    assert np.allclose(alone, among, atol=1e-6)


def test_no_rows(registry: Registry):
    trunk = load(registry, add_text_trunk(registry))
    assert trunk.encode([]).shape == (0, 4)


def test_a_text_without_tokens_gives_numbers_that_are_not(registry: Registry):
    """The batcher finds them and makes them an error of their row."""
    trunk = load(registry, add_text_trunk(registry))
    features = trunk.encode([PreparedText([]), PreparedText([2])])
    assert np.isnan(features[0]).all()
    assert np.isfinite(features[1]).all()


def test_an_image_trunk(registry: Registry):
    trunk = load(registry, add_image_trunk(registry))
    prepared = trunk.preprocessor.prepare(encoded_image((255, 0, 51)))  # type: ignore[arg-type]
    assert np.allclose(trunk.encode([prepared, prepared]), [[1, 0, 0.2]] * 2, atol=1e-6)


def test_many_threads_share_a_trunk(registry: Registry):
    trunk = load(registry, add_text_trunk(registry))
    rows = [PreparedText([2 + n % 6] * (1 + n % 5)) for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: trunk.encode([row])[0], rows))
    for row, features in zip(rows, found, strict=True):
        assert np.allclose(features, text_features(embedding(0), row.ids), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["trunk.onnx", "tokenizer.json", "preprocess.json", "golden.safetensors"]
)
def test_a_trunk_with_a_changed_or_missing_file_does_not_load(
    registry: Registry, tmp_path: Path, name: str
):
    manifest = add_text_trunk(registry)
    path = tmp_path / f"trunks/{manifest.digest}/{name}"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Conflict):
        load(registry, manifest)
    path.unlink()
    with pytest.raises(NotFound):
        load(registry, manifest)


def test_a_head_gives_probabilities(registry: Registry):
    manifest = publish(registry, add_text_trunk(registry), labels=("a", "b", "c"))
    probabilities = Head.load(registry, manifest).predict(np.ones((5, 4), np.float32))
    assert probabilities.shape == (5, 3)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("difference", [0.0, TOLERANCE * 0.9, -TOLERANCE * 0.9])
def test_golden_rows_within_the_tolerance_pass(difference: float):
    expected = np.array([[0.1, 0.9]])
    require_equal(expected + difference, expected, "x")
    require_equal(expected * 1e6 + difference * 1e5, expected * 1e6, "x")


@pytest.mark.parametrize(
    "actual",
    [[[0.1, 0.9 + 2 * TOLERANCE]], [[np.nan, 0.9]], [[np.inf, 0.9]], [[0.1]], [0.1, 0.9], []],
)
def test_golden_rows_beyond_it_do_not(actual: list[float]):
    with pytest.raises(Conflict, match="golden"):
        require_equal(np.array(actual), np.array([[0.1, 0.9]]), "x")


def test_nothing_is_equal_to_golden_rows_that_are_not_finite():
    assert np.isnan(tolerance(np.array([1.0, np.inf])))
    for value in (np.nan, np.inf):
        rows = np.array([[value]])
        with pytest.raises(Conflict):
            require_equal(rows, rows, "x")
