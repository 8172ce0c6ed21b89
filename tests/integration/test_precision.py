"""int8: trunks against torch and against ONNX Runtime's own quantiser, and jobs that use them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic

from core.datasets import DatasetManifest, Modality, UploadedFile
from core.errors import Conflict, DataError, ExportMismatch
from core.files import FileStore
from core.head import Head
from core.jobs import FineTuneRequest, Job, JobKind, JobStatus, StopReason
from core.manifests import Slot
from core.preprocessing import FloatArray, PreparedText
from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from core.trunk import INT8_TOLERANCE, Trunk, create_session, require_equal
from service.batcher import Batcher
from tests.integration.hf_models import (
    TEXT_MODELS,
    save_image_model,
    save_text_model,
)
from training import backbones, parity, quantization, trunks
from training.backbones import TorchBackbone
from training.data import Dataset
from training.ingest import Limits, ingest
from training.pipeline import fine_tune
from training.precision import SAMPLE_ROWS, Candidates, choose, sampled, stratified

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def distances(actual: FloatArray, expected: FloatArray) -> np.ndarray:
    """How far each row is off, by its length."""
    lengths: np.ndarray = np.linalg.norm(actual - expected, axis=1)
    return lengths / np.linalg.norm(expected, axis=1)


def load_tiny(kind: str, folder: Path) -> TorchBackbone:
    save = save_text_model if kind in TEXT_MODELS else save_image_model
    path = str(save(kind, folder / kind))
    return backbones.load(f"hf:{path}", (path,))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trunk]:
    """MiniLM in both precisions."""
    registry = Registry(ArtifactStore(str(tmp_path_factory.mktemp("store"))))
    return {
        precision: trunks.ensure_trunk(
            registry, "minilm", precision=precision, hf_models=(), threads=1, max_pixels=1,
            on_export=lambda: None,
        )
        for precision in ("fp32", "int8")
    }  # fmt: skip


@pytest.mark.parametrize("kind", [*TEXT_MODELS, "vit", "convnext"])
def test_encoders_with_linear_layers_in_int8(kind: str, tmp_path: Path) -> None:
    backbone = load_tiny(kind, tmp_path)
    manifest, files = trunks.export(backbone, "int8")  # which compares them with torch and peft
    assert manifest.precision == "int8"
    graph = onnx.load_from_string(files["trunk.onnx"])
    branches = [a.g for n in graph.graph.node if n.op_type == "If" for a in n.attribute]
    for branch in branches:
        kinds = [node.op_type for node in branch.node]
        assert kinds.count("MatMulInteger") >= sum(s.kind == "linear" for s in manifest.slots)
    assert len(branches) == 2


def test_an_int8_export_is_reproducible(tmp_path: Path) -> None:
    backbone = load_tiny("bert", tmp_path)
    graphs = [trunks.to_int8(trunks.to_onnx(backbone, trunks.slots_of(backbone))) for _ in range(2)]
    assert graphs[0] == graphs[1]


def test_an_encoder_of_convolutions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no linear layers") as caught:
        trunks.export(load_tiny("resnet", tmp_path), "int8")
    assert caught.value.param == "precision"


def test_the_quantiser_is_onnx_runtimes(tmp_path: Path) -> None:
    """On the same graph: the same integers and scales, and the same outputs but for rounding."""
    backbone = load_tiny("bert", tmp_path)
    plain = tmp_path / "plain.onnx"
    plain.write_bytes(trunks.to_onnx(backbone, ()))
    quantize_dynamic(
        plain, tmp_path / "theirs.onnx", op_types_to_quantize=["MatMul"], per_channel=True,
        reduce_range=True, extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    theirs, ours = onnx.load(tmp_path / "theirs.onnx"), onnx.load(plain)
    assert quantization.quantise(ours) == 12
    matrices: list[dict[str, bytes]] = [
        {
            tensor.name.removesuffix(suffix): numpy_helper.to_array(tensor).tobytes()
            for tensor in model.graph.initializer
            if tensor.name.endswith(suffix)
        }
        for model, suffix in (
            (theirs, "_quantized"), (ours, ".int8"), (theirs, "_scale"), (ours, ".scale"),
        )
    ]  # fmt: skip
    assert len(matrices[0]) == 12
    assert matrices[0] == matrices[1]
    assert matrices[2] == matrices[3]
    ids = np.arange(4, 16).reshape(2, 6)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    outputs = [
        create_session(model.SerializeToString(), 1).run(
            None, {i.name: feed[i.name] for i in model.graph.input}
        )[0]
        for model in (theirs, ours)
    ]
    np.testing.assert_allclose(*outputs, atol=1e-6)


def test_weights_have_seven_bits_and_an_empty_channel_stays_empty() -> None:
    weight = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    weight[:, 3] = 0
    integers, scales = quantization.quantise_weight(weight)
    assert np.abs(integers).max() == 64
    assert not integers[:, 3].any()
    assert np.abs(integers * scales - weight).max() <= scales.max() / 2 * (1 + 1e-6)


def test_minilm_in_int8(minilm: dict[str, Trunk]) -> None:
    fp32, int8 = minilm["fp32"], minilm["int8"]
    assert fp32.manifest.digest != int8.manifest.digest
    assert fp32.manifest.backbone_digest == int8.manifest.backbone_digest
    rows = list(int8.golden_rows)
    plain = int8.encode(rows)
    assert (distances(plain, fp32.encode(rows)) > 0).all()
    assert (distances(plain, fp32.encode(rows)) < INT8_TOLERANCE).all()
    # A batch of the same rows is the same numbers: what replaying golden rows relies on.
    assert np.array_equal(plain, int8.encode(rows))


def test_rows_of_several_models_share_an_int8_batch(minilm: dict[str, Trunk]) -> None:
    fp32, int8 = minilm["fp32"], minilm["int8"]
    slots = int8.manifest.slots
    chosen = [parity.random_adapter(slots, 4, 1), parity.random_adapter(slots, 16, 2)]
    words = [PreparedText([101, 2073, 2003, 2026, 4003, 102])] * 3
    expected, actual = (
        trunk.encode(words, trunk.bank.gather([None, *map(trunk.bank.add, chosen)]))
        for trunk in (fp32, int8)
    )
    assert (distances(actual, expected) < INT8_TOLERANCE).all()
    # Each row is its own model's, not its neighbour's.
    for shift in (1, 2):
        others = distances(actual, np.roll(expected, shift, axis=0))
        assert (1.5 * distances(actual, expected) < others).all()


def test_rows_of_many_requests_get_from_the_batcher_what_they_get_alone(
    minilm: dict[str, Trunk],
) -> None:
    """Texts of several lengths, plain and of two models, on the real trunk."""
    trunk = minilm["fp32"]
    slots, prepare = trunk.manifest.slots, trunk.preprocessor.prepare
    banked = [None, *(trunk.bank.add(parity.random_adapter(slots, 8, seed)) for seed in (1, 2))]
    text = "where is the card that I lost abroad, and who will send me another one by Monday"
    rows = [prepare(text[n % 7 : 15 + 6 * (n % 11)]) for n in range(48)]  # type: ignore[arg-type]

    async def encode_all() -> list[Any]:
        batcher = Batcher(trunk, "t", 1000, trunk.bank)
        deadline = time.monotonic() + 60
        try:
            return await asyncio.gather(
                *(
                    batcher.encode([row], deadline, model=number % 3, adapter=banked[number % 3])
                    for number, row in enumerate(rows)
                )
            )
        finally:
            await batcher.close()

    assert len({row.cost for row in rows}) > 5
    for number, (features,) in enumerate(asyncio.run(encode_all())):
        (alone,) = trunk.encode([rows[number]], trunk.bank.gather([banked[number % 3]]))
        assert np.abs(features - alone).max() <= 1e-5


def spoiled(graph: bytes, fault: str) -> bytes:
    model = onnx.load_from_string(graph)
    scales = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    for tensor in scales:
        values = numpy_helper.to_array(tensor)
        values = -values if fault == "sign" else np.roll(values, 1, axis=-1)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    return model.SerializeToString()


@pytest.mark.parametrize("fault", ["sign", "columns"])
def test_an_int8_graph_that_computes_something_else_is_a_mismatch(
    fault: str, minilm: dict[str, Trunk], tmp_path: Path
) -> None:
    backbone = backbones.load("minilm", ())
    graph = trunks.to_int8(trunks.to_onnx(backbone, ()))
    batches = list(parity.probes(backbone))[:2]
    manifest = minilm["int8"].manifest.model_copy(update={"slots": ()})
    assert parity.max_difference(backbone, manifest, graph, batches) > 1e-4
    with pytest.raises(ExportMismatch, match="differs from torch"):
        parity.max_difference(backbone, manifest, spoiled(graph, fault), batches)


# -- the choice ------------------------------------------------------------------------------


class FakeTrunk:
    """A trunk as far as the choice looks at it."""

    def __init__(self, precision: str, kinds: Sequence[str] = ("linear",)) -> None:
        slots = [Slot(name=k, block=0, kind=k, in_dim=1, out_dim=1) for k in kinds]  # type: ignore[arg-type]
        self.manifest = type("Manifest", (), {"slots": slots, "precision": precision})


def dataset(labels: list[str], file: str = "file-a") -> Dataset:
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    manifest = DatasetManifest(
        modality=Modality.TEXT, rows=len(labels), counts=counts, sha256="0" * 64
    )
    return Dataset(
        file, manifest, [f"{file} {i} {label}" for i, label in enumerate(labels)], labels
    )


def compare(wrong: dict[str, int], rows: int = 1000) -> Any:
    """The choice on `rows` validation rows of which each precision misses some."""
    opened: list[str] = []

    def open_trunk(precision: str) -> Any:
        opened.append(precision)
        return FakeTrunk(precision)

    def extract(trunk: Any, data: Dataset) -> FloatArray:
        signs = np.array([1.0 if label == "a" else -1.0 for label in data.answers], np.float32)
        if data.file == "held-out":
            signs[: wrong[trunk.manifest.precision]] *= -1
        return signs[:, None]

    train, held_out = dataset(["a", "b"] * 20), dataset(["a", "b"] * (rows // 2), "held-out")
    request = FineTuneRequest(model="minilm", training_file="file-a", precision="auto")
    trunk, choice = choose(request, Candidates(open_trunk, extract, train, held_out))
    assert opened == ["fp32", "int8"]
    assert choice is not None
    assert choice.precision == trunk.manifest.precision
    return choice


@pytest.mark.parametrize(
    ("fp32", "int8", "expected"),
    [
        (100, 100, "int8"),
        (100, 104, "int8"),
        (100, 105, "fp32"),
        (100, 300, "fp32"),
        (9, 0, "int8"),
    ],
)
def test_int8_may_lose_less_than_half_a_point(fp32: int, int8: int, expected: str) -> None:
    choice = compare({"fp32": fp32, "int8": int8})
    assert choice.precision == expected
    assert choice.rows == 1000
    assert choice.fp32_accuracy == pytest.approx(1 - fp32 / 1000)
    assert choice.int8_accuracy == pytest.approx(1 - int8 / 1000)


def test_without_linear_layers_nothing_is_measured() -> None:
    request = FineTuneRequest(model="m", training_file="file-a", precision="auto")

    def extract(*_: object) -> FloatArray:
        raise AssertionError("measured")

    candidates = Candidates(
        lambda precision: FakeTrunk(precision, ["convolution"]),  # type: ignore[arg-type,return-value]
        extract, dataset(["a", "b"]), None,
    )  # fmt: skip
    trunk, choice = choose(request, candidates)
    assert choice is not None
    assert (trunk.manifest.precision, choice.precision, choice.rows) == ("fp32", "fp32", 0)


def test_a_sample_has_every_class_by_its_share() -> None:
    labels = ["rare"] * 3 + ["small"] * 400 + ["large"] * 9_597
    rows = stratified(labels, 1000, seed=0)
    assert rows == sorted(set(rows))
    assert len(rows) == 1000
    drawn = [labels[row] for row in rows]
    assert drawn.count("rare") >= 2
    assert drawn.count("small") == pytest.approx(40, abs=3)
    assert rows != stratified(labels, 1000, seed=1)
    assert rows == stratified(labels, 1000, seed=0)
    many = sampled(dataset(labels), 0)
    assert (len(many.items), many.manifest.rows) == (SAMPLE_ROWS, SAMPLE_ROWS)
    assert all(item.endswith(label) for item, label in zip(many.items, many.answers, strict=True))  # type: ignore[arg-type]
    assert stratified(labels[:50], 1000, seed=0) == list(range(50))


# -- whole jobs ------------------------------------------------------------------------------


class Listener:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, object]] = {}
        self.stop_reason: StopReason | None = None

    def event(self, type: str, message: str, **data: object) -> None:
        self.events[type] = {"message": message, **data}

    def progress(self, stage: str, fraction: float) -> None:
        assert 0 <= fraction <= 1

    def check(self) -> None:
        """Never stopped."""

    def authorise(self) -> None:
        """Always allowed."""


class Stand:
    """A store with a data set of two classes and a tiny encoder, to run jobs on."""

    def __init__(self, folder: Path, kind: str = "bert") -> None:
        self.model = str(save_text_model(kind, folder / "model"))
        self.store = ArtifactStore(str(folder / "store"))
        self.settings = Settings(hf_models=(self.model,))
        self.registry = Registry(self.store)
        files = FileStore(self.store, "default")
        lines = [f"{'lost card' if row % 2 else 'money transfer'} {'my ' * (row % 5)},{row % 2}"
                 for row in range(60)]  # fmt: skip
        data = "\n".join(["text,label", *lines]).encode()
        self.store.put_new(files.upload_key("file-1"), data)
        files.complete(UploadedFile(id="file-1", filename="a.csv", bytes=len(data), created_at=0))
        ingest(files, "file-1", Limits.from_settings(self.settings))

    def run(self, precision: str, listener: Listener, strategy: str = "feature_extraction") -> Any:
        spec = FineTuneRequest.model_validate(
            {"model": f"hf:{self.model}", "training_file": "file-1", "suffix": precision,
             "precision": precision, "strategy": strategy}
        )  # fmt: skip
        job = Job(
            tenant="default", id=f"ftjob-{precision}-{strategy.replace('_', '-')}",
            kind=JobKind.FINE_TUNE, status=JobStatus.RUNNING,
            spec=spec.model_dump(mode="json"), attempt=1, created_at=0,
        )  # fmt: skip
        return fine_tune(job, self.store, self.settings, listener)


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand(tmp_path_factory.mktemp("stand"))


def test_a_job_in_int8_is_fitted_on_the_trunk_it_is_served_with(stand: Stand) -> None:
    listener = Listener()
    manifest = stand.run("int8", listener)
    trunk = Trunk.load(stand.registry, manifest.trunk, threads=1, max_pixels=1)
    assert trunk.manifest.precision == "int8"
    head = Head.load(stand.registry, manifest)
    rows = trunk.preprocessor.prepare_many(["lost card my", "money transfer"])  # type: ignore[union-attr]
    predicted = head.predict(trunk.encode(rows)).argmax(axis=1)
    assert [manifest.labels[label] for label in predicted] == ["1", "0"]
    assert "precision_chosen" not in listener.events


def test_auto_measures_and_says_what_it_chose(stand: Stand) -> None:
    listener = Listener()
    manifest = stand.run("auto", listener)
    chosen = listener.events["precision_chosen"]
    assert chosen["rows"] == 60
    assert chosen["precision"] == stand.registry.trunk(manifest.trunk).precision
    loss = float(chosen["fp32_accuracy"]) - float(chosen["int8_accuracy"])  # type: ignore[arg-type]
    assert (chosen["precision"] == "int8") == (loss < 0.005)
    report = json.loads(stand.registry.file(manifest, "report.json"))
    decision = next(each for each in report["decisions"] if each["what"] == "Precision")
    assert decision["chosen"] == chosen["precision"]
    assert decision["data"].items() <= chosen.items()
    assert decision["why"].startswith(chosen["reason"])


def test_a_trunk_whose_golden_rows_come_out_differently_is_refused(stand: Stand) -> None:
    manifest = stand.run("int8", Listener())
    trunk = stand.registry.trunk(manifest.trunk)
    loaded = Trunk.load(stand.registry, trunk.digest, threads=1, max_pixels=1)
    features = loaded.encode(loaded.golden_rows)
    require_equal(features * 1.1, features, "trunk", "int8")
    for wrong in (features * 1.5, -features, features[::-1] + 1, np.full_like(features, np.nan)):
        with pytest.raises(Conflict):
            require_equal(wrong, features, "trunk", "int8")
    with pytest.raises(Conflict):
        require_equal(features * 1.1, features, "trunk", "fp32")
