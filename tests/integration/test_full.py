"""`full` from data set to served model, on encoders of two blocks that run in milliseconds.

The words' label is one that no linear head on the frozen encoder can tell (tests.integration.
test_gradual), the images' one that it tells badly.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.checkpoints import Checkpoints
from core.datasets import Modality, UploadedFile
from core.files import FileStore
from core.head import Head
from core.manifests import OWN_TRUNK, ModelManifest
from core.preprocessing import Preprocessor
from core.trunk import Trunk, build_preprocessor
from tests.integration.hf_models import (
    IMAGE_MODELS,
    TEXT_MODELS,
    exclusive_or,
    save_image_model,
    save_text_model,
    spots,
)
from tests.integration.test_gradual import ROWS, Listener, Stand
from training import backbones, full, parity
from training.activations import Batch
from training.backbones import TorchBackbone
from training.fit import Head as Classifier
from training.ingest import Limits, ingest
from training.objectives import Classes
from training.pipeline import fine_tune
from training.report import Report
from training.stopping import Stopped
from training.trainer import Recipe, Trainer
from training.tuning import Regularisation, Tuning
from training.whole import BOTTOM_RATE, TOP_RATE, ItemRows, WholePart

FILES = ("head.onnx", "golden.safetensors", "own-trunk.onnx", "own-golden.safetensors")
FEW = {"n_epochs": 7, "learning_rate_multiplier": 15, "batch_size": 32}


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand(tmp_path_factory.mktemp("full"))


def run(
    stand: Stand, id: str, listener: Listener | None = None, attempt: int = 1, **spec: Any
) -> ModelManifest:
    wanted = {"strategy": "full", "hyperparameters": FEW, "promote": id == "ftjob-whole"}
    return stand.run(stand.job(id, attempt, **(wanted | spec)), listener or Listener())


@pytest.fixture(scope="module")
def whole(stand: Stand) -> tuple[ModelManifest, Listener]:
    """One job that ran through."""
    listener = Listener()
    return run(stand, "ftjob-whole", listener), listener


def answers(stand: Stand, manifest: ModelManifest) -> float:
    """How much of the data a version answers rightly, as the service would compute it."""
    trunk = Trunk.load_for(stand.registry, manifest, threads=1, max_pixels=1)
    head = Head.load(stand.registry, manifest, trunk)
    data = [line.split(",") for line in exclusive_or(ROWS).decode().splitlines()[1:]]
    rows = [trunk.preprocessor.prepare(text) for text, _ in data]  # type: ignore[arg-type]
    given = head.predict(trunk.encode(rows)).argmax(axis=1)
    labels = [manifest.labels[answer] for answer in given]
    return float(np.mean([label == row[1] for label, row in zip(labels, data, strict=True)]))


def test_a_tuned_backbone_ships_as_a_trunk_of_the_model_s_own(
    stand: Stand, whole: tuple[ModelManifest, Listener]
) -> None:
    manifest, listener = whole
    [step] = listener.of("unfrozen")
    assert step["gain"] > max(step["gain_error"], 0.005)
    assert (manifest.kind, manifest.rank, manifest.blocks) == ("full", 0, 2)
    assert manifest.metrics["rows"] == pytest.approx(ROWS // 3, abs=ROWS // 30)
    assert manifest.metrics["accuracy"] == pytest.approx(step["accuracy"])
    assert manifest.metrics["accuracy"] > 0.9
    assert answers(stand, manifest) > 0.9

    # Nobody finds it who does not have the version, and nothing is kept that only it would use.
    own = stand.registry.own_trunk(manifest)
    shared = stand.registry.newest_trunk(f"hf:{stand.model}")
    assert shared is not None
    assert (own.digest, own.slots) == (manifest.trunk, ())
    assert list(stand.store.children("trunks")) == [shared.digest]
    assert not [e.key for e in stand.store.walk("default") if manifest.trunk in e.key]
    assert stand.store.size(f"trunks/{shared.digest}/trunk.onnx") > len(  # type: ignore[operator]
        stand.registry.file(manifest, f"{OWN_TRUNK}trunk.onnx")
    )
    assert Checkpoints(stand.store, "default", "ftjob-whole").list() == []

    report = Report.model_validate_json(stand.registry.file(manifest, "report.json"))
    assert report.lineage.trunk == manifest.trunk
    [name] = [step.name for step in report.steps[1:]]
    assert name.startswith("Everything")
    assert (name, "kept") in {(each.what, each.chosen) for each in report.decisions}


def test_a_job_that_was_paused_ends_with_the_same_bytes(
    stand: Stand, whole: tuple[ModelManifest, Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within the first training, and then in the last, where the state is too large."""
    total, [step] = len(whole[1].of("epoch_ended")), whole[1].of("unfrozen")
    heard = []
    for attempt, epochs in enumerate((3, total - 3 - 1), start=1):
        listener = Listener(stop_after_epochs=epochs)
        with pytest.raises(Stopped):
            run(stand, "ftjob-paused", listener, attempt)
        heard.append({epoch["step"] for epoch in listener.of("epoch_ended")[:3]})
        monkeypatch.setattr(full, "MAX_STATE_BYTES", 0)
    # Nothing was kept but what was asked for: the time for another state had not come.
    assert (heard[0], len(heard[1])) == ({0}, 1)
    resumed = Listener()
    manifest = run(stand, "ftjob-paused", resumed, 3)
    assert resumed.of("state_restored")[0]["from_step"] > 0
    assert len(resumed.of("epoch_ended")) == step["epochs"] > 1, step
    assert [manifest.files[n] for n in FILES] == [whole[0].files[n] for n in FILES]
    assert manifest.metrics == whole[0].metrics


def test_the_frozen_head_ships_if_it_is_as_good_or_there_is_no_time(
    stand: Stand, whole: tuple[ModelManifest, Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"n_epochs": 1, "learning_rate_multiplier": 0.001}
    shared = stand.registry.newest_trunk(f"hf:{stand.model}")
    assert shared is not None
    heads = set()
    for id, seconds in (("ftjob-kept", 0.0), ("ftjob-late", 3.0)):
        listener = Listener()
        monkeypatch.setattr(full, "row_seconds", lambda *_, seconds=seconds: seconds)
        manifest = run(stand, id, listener, suffix="frozen", hyperparameters=few, max_seconds=1000)
        assert len(listener.of("unfrozen")) == (seconds == 0.0)
        assert len(listener.of("frozen_head_kept")) == 1
        assert (manifest.kind, manifest.trunk) == ("linear", shared.digest)
        heads.add(manifest.files["head.onnx"])
        assert not any(name.startswith(OWN_TRUNK) for name in manifest.files)
    assert len(heads) == 1


def test_a_tuned_model_is_continued_from_its_backbone_and_compared_by_its_own_trunk(
    stand: Stand, whole: tuple[ModelManifest, Listener]
) -> None:
    """The gate's rows are new to it."""
    files, data = FileStore(stand.store, "default"), exclusive_or(ROWS + 120)
    new = b"\n".join([b"text,label", *data.splitlines()[-120:]])
    stand.store.put_new(files.upload_key("file-new"), new)
    files.complete(UploadedFile(id="file-new", filename="b.csv", bytes=len(new), created_at=0))
    ingest(files, "file-new", Limits.from_settings(stand.settings))
    gate = {"min_improvement_over_current": -0.01}
    manifest = run(
        stand, "ftjob-continued", model=whole[0].reference, strategy="feature_extraction",
        training_file="file-new", quality_gate=gate, promote=False,
    )  # fmt: skip
    assert (manifest.backbone, manifest.kind) == (whole[0].backbone, "linear")
    assert manifest.parent == whole[0].reference
    assert manifest.gate is not None
    assert (manifest.gate.current, manifest.gate.basis) == (whole[0].reference, "same_rows")
    assert manifest.gate.current_accuracy is not None
    assert manifest.gate.current_accuracy > 0.85


def test_images_are_tuned_on_views_that_each_epoch_draws_anew(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(save_image_model("vit", tmp_path / "vit"))
    files, data = FileStore(stand.store, "default"), spots(60)
    stand.store.put_new(files.upload_key("file-spots"), data)
    files.complete(UploadedFile(id="file-spots", filename="a.zip", bytes=1, created_at=0))
    settings = stand.settings.model_copy(update={"hf_models": (folder,)})
    ingest(files, "file-spots", Limits.from_settings(settings))
    drawn: dict[bytes, int] = {}
    draw = ItemRows.draw

    def remember(self: ItemRows, row: int) -> torch.Tensor:
        pixels = draw(self, row)
        drawn[pixels.numpy().tobytes()] = drawn.get(pixels.numpy().tobytes(), 0) + 1
        return pixels

    monkeypatch.setattr(ItemRows, "draw", remember)
    few = {"n_epochs": 6, "learning_rate_multiplier": 5, "batch_size": 10}
    job = stand.job(
        "ftjob-spots", model=f"hf:{folder}", training_file="file-spots", suffix="spots",
        strategy="full", hyperparameters=few,
    )  # fmt: skip
    manifest = fine_tune(job, stand.store, settings, Listener())
    assert (manifest.kind, manifest.modality) == ("full", Modality.IMAGE)
    # Below 300 rows each third is held out in turn, and the last training is of all.
    views = sum(drawn.values())
    assert views > 3 * 40
    # The plain and the mirrored one come again, crops do not.
    assert 60 * 2 + views // 4 < len(drawn) < views
    trunk = Trunk.load_for(stand.registry, manifest, threads=1, max_pixels=10_000)
    assert Head.load(stand.registry, manifest, trunk).predict(
        trunk.encode(trunk.golden_rows)
    ).shape == (2, 2)


def loaded(kind: str, folder: Path) -> tuple[TorchBackbone, Preprocessor]:
    save = save_text_model if kind in TEXT_MODELS else save_image_model
    path = str(save(kind, folder / kind))
    backbone = backbones.load(f"hf:{path}", (path,))
    return backbone, build_preprocessor(
        backbone.preprocess, backbone.tokenizer_json or b"", max_pixels=10**6
    )


@pytest.mark.parametrize("kind", [*TEXT_MODELS, *IMAGE_MODELS])
def test_a_whole_encoder_begins_as_the_backbone_and_moves_less_below(
    kind: str, tmp_path: Path
) -> None:
    """One step moves every weight that has a part in it, and no statistics of a batch norm."""
    backbone, preprocessor = loaded(kind, tmp_path)
    part = WholePart(backbone)
    rows = next(parity.probes(backbone))
    given = [
        torch.from_numpy(row.pixels) if hasattr(row, "pixels") else torch.tensor(row.ids)
        for row in rows
    ]
    with torch.no_grad():
        expected = backbone.module(*parity.torch_inputs(backbone, rows))
        assert torch.allclose(part(Batch.of(given, backbone.modality)), expected, atol=1e-5)

    rates = [parameter.rate for parameter in part.parameters()]
    assert max(rates) == TOP_RATE
    assert min(rates) == pytest.approx(TOP_RATE * BOTTOM_RATE)
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}
    items: Any = ["lost my card", "help"]
    if kind in IMAGE_MODELS:
        with zipfile.ZipFile(io.BytesIO(spots(2))) as archive:
            items = [archive.read(name) for name in archive.namelist()]
    targets = np.array([0, 1])
    data, objective = ItemRows.of(preprocessor, items, targets), Classes(targets, 2)
    head = Classifier(np.ones((backbone.dim, 2), np.float32), np.zeros(2, np.float32))
    task = Tuning(part, objective, head, data, None, batch_size=2, regularisation=Regularisation())
    Trainer(task, Recipe(epochs=1, learning_rate=0.1), seed=0).run(check=lambda: None)
    trained = {name: value.clone() for name, value in part.backbone().module.state_dict().items()}
    for share in (0.5, 1.0):
        part.set_share(share)
        after = part.backbone().module.state_dict()
        for name, value in after.items():
            between = before[name] + share * (trained[name] - before[name])
            assert torch.allclose(value.float(), between.float(), atol=1e-6)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("embed" in name for name in moved)
    assert not any("running" in name or "num_batches" in name for name in moved)
    assert all(torch.equal(before[n], v) for n, v in backbone.module.state_dict().items())
