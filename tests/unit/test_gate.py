"""The quality gate: its arithmetic, and a fair comparison with the version in production."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from core.datasets import DatasetManifest, Modality, UploadedFile
from core.files import FileStore
from core.head import Head
from core.jobs import QualityGate
from core.manifests import DatasetReference, ModelManifest
from core.registry import Registry
from core.store import ArtifactStore
from tests.builders import TENANT, add_text_trunk, draft, head_files, promote
from training.duplicates import content_key
from training.gate import Comparison, HeldOut, compare_with_current, judge

ROWS = 60


def compared(current: float | None, new: float, basis: str | None = "same_rows") -> Comparison:
    return Comparison("pets@1", current, new, basis, 100)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate", "accuracy", "comparison", "passed"),
    [
        (QualityGate(min_accuracy=0.8), 0.8, None, True),
        (QualityGate(min_accuracy=0.8), 0.79, None, False),
        (QualityGate(min_improvement_over_current=0.01), 0.5, None, True),
        (QualityGate(min_improvement_over_current=0.1), 0.9, compared(0.8, 0.9), True),
        (QualityGate(min_improvement_over_current=0.1), 0.9, compared(0.81, 0.9), False),
        (QualityGate(min_improvement_over_current=0.0), 0.9, compared(0.9, 0.9), True),
        (QualityGate(min_improvement_over_current=-0.05), 0.9, compared(0.94, 0.9), True),
        (QualityGate(min_improvement_over_current=-0.05), 0.9, compared(0.96, 0.9), False),
        (QualityGate(min_improvement_over_current=-1), 0.9, compared(None, 0.9, None), False),
        (
            QualityGate(min_accuracy=0.95, min_improvement_over_current=0),
            0.9, compared(0.5, 0.9), False,
        ),
    ],
)  # fmt: skip
def test_what_passes(
    gate: QualityGate, accuracy: float, comparison: Comparison | None, passed: bool
) -> None:
    outcome = judge(gate, accuracy, comparison)
    assert outcome.passed is passed
    assert bool(outcome.reasons) is not passed


@pytest.mark.parametrize("field", ["min_accuracy", "min_improvement_over_current", "minimum"])
def test_what_is_no_gate(field: str) -> None:
    with pytest.raises(ValidationError):
        QualityGate.model_validate({field: 1.5})


class TestComparison:
    """A version in production that was fitted on the first 30 rows of a file."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> ArtifactStore:
        return ArtifactStore(str(tmp_path))

    @pytest.fixture
    def registry(self, store: ArtifactStore) -> Registry:
        return Registry(store)

    @pytest.fixture
    def files(self, store: ArtifactStore) -> FileStore:
        return FileStore(store, TENANT)

    @pytest.fixture
    def current(self, registry: Registry, files: FileStore) -> ModelManifest:
        table = pa.table({"text": texts()[:30], "label": ["cat", "dog"] * 15})
        data = io.BytesIO()
        pq.write_table(table, data)
        files.complete(UploadedFile(id="file-old", filename="x", bytes=1, created_at=0))
        counts, sha256 = {"cat": 15, "dog": 15}, hashlib.sha256(data.getvalue()).hexdigest()
        manifest = DatasetManifest(modality=Modality.TEXT, rows=30, counts=counts, sha256=sha256)
        files.accept("file-old", data.getvalue(), manifest)
        trunk = add_text_trunk(registry)
        version = registry.publish(
            draft(trunk).model_copy(
                update={
                    "dataset": DatasetReference(file="file-old", sha256=sha256, rows=30),
                    "metrics": {"accuracy": 0.75},
                }
            ),
            head_files(trunk.dim),
        )
        promote(registry, version)
        return version

    def held_out(
        self, registry: Registry, current: ModelManifest, rows: slice, dataset: str | None = None
    ) -> HeldOut:
        """Rows that are labelled as the current version answers them, and "cat" to all by ours."""
        features = np.random.default_rng(0).normal(size=(ROWS, current.dim)).astype(np.float32)
        answers = Head.load(registry, current).predict(features).argmax(axis=1)
        labels = [current.labels[answer] for answer in answers][rows]
        return HeldOut(
            texts()[rows], features[rows], current.trunk, labels, ["cat"] * len(labels), dataset
        )

    def compare(
        self, registry: Registry, files: FileStore, held_out: HeldOut, name: str = "pets"
    ) -> Comparison | None:
        def load(model: ModelManifest) -> tuple[Head, np.ndarray]:
            raise AssertionError("the trunk is shared")

        return compare_with_current(registry, files, TENANT, name, held_out, load)

    def test_a_first_version_has_nothing_to_beat(
        self, registry: Registry, files: FileStore, current: ModelManifest
    ) -> None:
        held_out = self.held_out(registry, current, slice(None))
        assert self.compare(registry, files, held_out, "newcomers") is None

    def test_rows_that_the_current_version_was_fitted_on_are_left_out(
        self, registry: Registry, files: FileStore, current: ModelManifest
    ) -> None:
        held_out = self.held_out(registry, current, slice(None))
        found = self.compare(registry, files, held_out)
        assert found is not None
        assert (found.current, found.basis, found.rows) == ("pets@1", "same_rows", 30)
        assert found.current_accuracy == 1.0
        assert found.new_accuracy == np.mean([label == "cat" for label in held_out.labels[30:]])

    def test_what_was_read_already_is_not_read_again(
        self, registry: Registry, files: FileStore, current: ModelManifest
    ) -> None:
        files.delete("file-old")
        found = compare_with_current(
            registry, files, TENANT, "pets", self.held_out(registry, current, slice(None)),
            lambda model: (Head.load(registry, model), np.empty((0, 0), np.float32)),
            {"file-old": {content_key(text) for text in texts()[:30]}},
        )  # fmt: skip
        assert found is not None
        assert (found.rows, found.current_accuracy) == (30, 1.0)

    def test_another_trunk_computes_its_own_features(
        self, registry: Registry, files: FileStore, current: ModelManifest
    ) -> None:
        kept = self.held_out(registry, current, slice(30, None))
        other = HeldOut(
            kept.items, np.zeros((30, 9), np.float32), "another", kept.labels, kept.answers, None
        )
        found = compare_with_current(
            registry, files, TENANT, "pets", other,
            lambda model: (Head.load(registry, model), kept.features),
        )  # fmt: skip
        assert found is not None
        assert found.current_accuracy == 1.0

    def test_the_same_file_again_goes_by_what_was_recorded(
        self, registry: Registry, files: FileStore, current: ModelManifest
    ) -> None:
        held_out = self.held_out(registry, current, slice(30), current.dataset.sha256)
        found = self.compare(registry, files, held_out)
        assert found is not None
        assert (found.current_accuracy, found.basis) == (0.75, "recorded")

    def test_rows_that_allow_no_fair_comparison_shut_the_gate(
        self, registry: Registry, files: FileStore, current: ModelManifest
    ) -> None:
        found = self.compare(registry, files, self.held_out(registry, current, slice(30)))
        assert found is not None
        assert found.current_accuracy is None
        outcome = judge(QualityGate(min_improvement_over_current=-1), 1.0, found)
        assert not outcome.passed
        assert "validation_file" in outcome.reasons[0]

    def test_a_file_that_was_deleted_cannot_be_left_out(
        self, registry: Registry, files: FileStore, current: ModelManifest
    ) -> None:
        files.delete("file-old")
        found = self.compare(registry, files, self.held_out(registry, current, slice(30)))
        assert found is not None
        assert found.rows == 30


def texts() -> list[str]:
    return [f"row {number}" for number in range(ROWS)]
