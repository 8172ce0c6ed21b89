"""`gradual` on images, from data set to published model: views, mix-up and the cut at work."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers.models.vit.modeling_vit import ViTLayer

from core.datasets import Modality, UploadedFile
from core.files import FileStore
from core.head import Head
from core.jobs import Job
from core.settings import Settings
from core.trunk import Trunk
from tests.integration.hf_models import save_image_model, spots
from tests.integration.test_gradual import Listener, Stand
from training import views
from training.activations import Batch, Upper
from training.ingest import Limits, ingest
from training.pipeline import fine_tune
from training.tuning import CachedRows

ROWS, BATCH = 60, 10
CUT_BYTES = 17 * 16 * 4
"""What enters a block of the small encoder: 16 patches and a token for all, 16 numbers each."""


class Images:
    """A stand with images of two classes, and an encoder of two blocks for them."""

    def __init__(self, folder: Path) -> None:
        self.stand = Stand(folder)
        model = str(save_image_model("vit", folder / "vit"))
        self.settings = Settings(hf_models=(model,))
        files, data = FileStore(self.stand.store, "default"), spots(ROWS)
        self.stand.store.put_new(files.upload_key("file-spots"), data)
        files.complete(UploadedFile(id="file-spots", filename="a.zip", bytes=1, created_at=0))
        ingest(files, "file-spots", Limits.from_settings(self.settings))
        self._spec = {
            "model": f"hf:{model}",
            "training_file": "file-spots",
            "suffix": "spots",
            "hyperparameters": {
                "n_epochs": 8, "learning_rate_multiplier": 10, "batch_size": BATCH,
            },
        }  # fmt: skip

    def job(self, id: str, **spec: Any) -> Job:
        return self.stand.job(id, **(self._spec | spec))

    def run(self, job: Job, listener: Listener) -> Any:
        return fine_tune(job, self.stand.store, self.settings, listener)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


class Seen:
    """What goes into the upper blocks: views as they were drawn, and what is trained on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.views: dict[int, set[bytes]] = {}
        self.mixed = self.trained = 0
        self.layers: list[int] = []
        self._runs: Counter[str] = Counter()
        draw, upper, layer = CachedRows.draw, Upper.forward, ViTLayer.forward

        def remember(rows: CachedRows, row: int) -> Tensor:
            view = draw(rows, row)
            self.views.setdefault(rows.plain(row).data_ptr(), set()).add(view.numpy().tobytes())
            return view

        def observe(part: Upper, batch: Batch) -> Tensor:
            features = upper(part, batch)
            if features.requires_grad:
                known = set().union(*self.views.values())
                self.trained += len(batch.hidden)
                self.mixed += sum(row.numpy().tobytes() not in known for row in batch.hidden)
            return features

        def count(block: ViTLayer, *args: Any, **kwargs: Any) -> Any:
            self._runs["layer"] += 1
            return layer(block, *args, **kwargs)

        monkeypatch.setattr(CachedRows, "draw", remember)
        monkeypatch.setattr(Upper, "forward", observe)
        monkeypatch.setattr(ViTLayer, "forward", count)

    def mark(self) -> None:
        """Note how many blocks have run so far."""
        self.layers.append(self._runs["layer"])


def test_images_are_tuned_on_mixed_views_above_the_cut(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)

    class Counting(Listener):
        def event(self, type: str, message: str, **data: object) -> None:
            if type == "epoch_ended":
                seen.mark()
            super().event(type, message, **data)

    listener = Counting()
    manifest = images.run(images.job("ftjob-images"), listener)
    [step] = listener.of("unfrozen")
    assert (step["blocks"], step["contrast"]) == (1, 0.0)
    assert listener.of("ladder_ended")[0]["reason"] == "top"

    # Of two blocks one is frozen: an epoch runs the other for each batch, and once to validate.
    assert seen.layers[1] - seen.layers[0] == math.ceil(ROWS * 2 / 3 / BATCH) + 1
    # Plain, mirrored and two crops, of every row and no more.
    assert len(seen.views) == ROWS
    assert {len(each) for each in seen.views.values()} <= {2, 3, views.IMAGE_VIEWS}
    assert sum(map(len, seen.views.values())) > 3 * ROWS
    assert seen.mixed > seen.trained / 2

    assert step["kept"], step
    assert (manifest.kind, manifest.modality, manifest.blocks) == ("low_rank", Modality.IMAGE, 1)
    assert (manifest.rank, manifest.metrics["rows"]) == (16, ROWS)
    trunk = Trunk.load_for(images.stand.registry, manifest, threads=1, max_pixels=10_000)
    Head.load(images.stand.registry, manifest, trunk)  # replays golden rows of the torch encoder


@pytest.mark.parametrize(
    ("room", "kept", "reason", "said"),
    [(2, [2], "top", "2 of 4 views"), (0, [], "space", "No step was tried: the rows' activations")],
)
def test_what_does_not_fit_is_said(
    images: Images, room: int, kept: list[int], reason: str, said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Fewer views are kept where there is no room for all; without room for one, none is tried.

    What comes of it is no answer to a job that has the room, so no later job takes it over.
    """
    monkeypatch.setattr(views, "MAX_BYTES", (room + 1) * ROWS * CUT_BYTES - 1)
    messages = []

    class Reading(Listener):
        def event(self, type: str, message: str, **data: object) -> None:
            messages.append(message)
            super().event(type, message, **data)

    listener = Reading()
    once = {"n_epochs": 1, "learning_rate_multiplier": 0.001, "batch_size": BATCH}
    job = images.job(f"ftjob-room-{room}", hyperparameters=once)
    manifest = images.run(job, listener)
    assert [each["views"] for each in listener.of("views_dropped")] == kept
    assert [each["reason"] for each in listener.of("ladder_ended")] == [reason]
    assert len(listener.of("unfrozen")) == len(kept)
    assert manifest.kind == "linear"
    assert any(said in message for message in messages)
    assert '"what": "Unfreezing"' in images.stand.registry.file(manifest, "report.json").decode()

    if not room:
        auto = Listener()
        images.run(images.job("ftjob-auto", strategy="auto", hyperparameters=once), auto)
        [choice] = auto.of("strategy_chosen")
        assert choice["strategy"] == "feature_extraction"
        assert "activations are too large" in choice["reason"]
