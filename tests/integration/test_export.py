"""Heads as ONNX, loaded and run by the code that serves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load

from core.datasets import Modality
from core.errors import Conflict, ExportMismatch
from core.head import Head as ServedHead
from core.manifests import GOLDEN_FILE, DatasetReference, ModelManifest
from core.registry import Registry
from core.store import ArtifactStore
from training.export import export_head, head_to_onnx, require_parity
from training.fit import Head


def random_head(dim: int = 12, classes: int = 5, scale: float = 3.0) -> Head:
    numbers = np.random.default_rng(0)
    return Head(
        (scale * numbers.normal(size=(dim, classes))).astype(np.float32),
        numbers.normal(size=classes).astype(np.float32),
    )


def random_features(rows: int = 20, dim: int = 12) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, dim)).astype(np.float32)


def publish(registry: Registry, files: dict[str, bytes], classes: int = 5) -> ModelManifest:
    return registry.publish(
        ModelManifest(
            tenant="default",
            name="test",
            version=0,
            job="ftjob-1",
            attempt=1,
            created_at=0.0,
            backbone="minilm",
            trunk="none",
            modality=Modality.TEXT,
            dim=12,
            labels=[f"label-{i}" for i in range(classes)],
            files={},
            dataset=DatasetReference(file="file-1", sha256="", rows=20),
            training={},
            metrics={},
        ),
        files,
    )


def test_a_published_head_predicts_what_torch_does(tmp_path: Path) -> None:
    head, features = random_head(), random_features()
    registry = Registry(ArtifactStore(str(tmp_path)))
    served = ServedHead.load(registry, publish(registry, export_head(head, features)))
    for rows in (1, 7, 20):
        actual = served.predict(features[:rows])
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, head.predict(features[:rows]), atol=1e-6)


def test_a_head_under_another_signature_is_not_loaded(tmp_path: Path) -> None:
    registry = Registry(ArtifactStore(str(tmp_path)))
    manifest = publish(registry, export_head(random_head(), random_features()), classes=4)
    with pytest.raises(Conflict, match="signature"):
        ServedHead.load(registry, manifest)


def test_the_same_head_gives_the_same_bytes() -> None:
    head, features = random_head(), random_features()
    assert export_head(head, features) == export_head(head, features)
    assert head_to_onnx(head) != head_to_onnx(random_head(scale=2.0))


def test_the_graph_is_small_and_plain() -> None:
    model = onnx.load_from_string(head_to_onnx(random_head()))
    assert [node.op_type for node in model.graph.node] == ["Gemm", "Softmax"]
    assert [entry.name for entry in model.graph.input] == ["features"]
    assert [entry.name for entry in model.graph.output] == ["probabilities"]
    shape = model.graph.output[0].type.tensor_type.shape.dim
    assert (shape[0].dim_param, shape[1].dim_value) == ("n", 5)


def test_golden_rows_are_few_and_hold_what_torch_gave() -> None:
    head, features = random_head(), random_features(rows=100)
    golden = load(export_head(head, features)[GOLDEN_FILE])
    np.testing.assert_array_equal(golden["features"], features[:8])
    np.testing.assert_array_equal(golden["probabilities"], head.predict(features[:8]))


@pytest.mark.parametrize("classes", [2, 150])
def test_any_number_of_classes(classes: int) -> None:
    assert export_head(random_head(classes=classes), random_features(rows=1))


def test_a_graph_of_another_head_is_a_mismatch() -> None:
    with pytest.raises(ExportMismatch, match="differs"):
        require_parity(random_head(), head_to_onnx(random_head(scale=2.9)), random_features())


def test_a_graph_of_another_shape_or_none_at_all_is_a_mismatch() -> None:
    with pytest.raises(ExportMismatch, match="shape"):
        require_parity(random_head(), head_to_onnx(random_head(classes=4)), random_features())
    with pytest.raises(ExportMismatch, match="cannot run"):
        require_parity(random_head(), b"not a graph", random_features())


def test_a_head_that_is_not_finite_is_a_mismatch() -> None:
    head = random_head()
    broken = Head(head.weight, np.full_like(head.bias, np.nan))
    with pytest.raises(ExportMismatch):
        export_head(broken, random_features())
