"""`gradual` from data set to served model, on an encoder of two blocks that runs in milliseconds.

The label says whether one of two words is there, but not both: no linear head on the encoder's mean
over tokens can tell, and a block with deltas can.
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.bert.modeling_bert import BertLayer

from core.adapters import feed
from core.backbones import BACKBONES
from core.checkpoints import Checkpoints
from core.datasets import Modality, UploadedFile
from core.errors import NoSpace
from core.files import FileStore
from core.head import Head
from core.jobs import EarlyStopping, Hyperparameters, Job, JobKind, JobStatus, StopReason
from core.manifests import ModelManifest
from core.novelty import NOVELTY_FILE
from core.registry import Registry
from core.settings import Settings
from core.store import ArtifactStore
from core.trunk import Trunk, build_preprocessor
from service.batcher import Batcher
from tests.integration.hf_models import (
    IMAGE_MODELS,
    TEXT_MODELS,
    exclusive_or,
    save_image_model,
    save_text_model,
    save_wide_model,
)
from training import backbones, parity, strategies, views
from training.activations import Batch, Upper, capture
from training.gradual import Gradual, Outcome
from training.ingest import Limits, ingest
from training.objectives import Classes
from training.pipeline import fine_tune
from training.plan import DEFAULTS, Rung
from training.report import Report
from training.rungs import SHARES, Source, Tasks
from training.search_state import Ending
from training.stopping import Stopped
from training.trainer import Recipe, Trainer
from training.trunks import slots_of
from training.tuning import DeltaPart

ROWS = 300
"""Of so many, one in three judges; of fewer, every row in turn."""

FEW_EPOCHS = {"n_epochs": 7, "learning_rate_multiplier": 10, "batch_size": 8}
FILES = ("head.onnx", "golden.safetensors", "adapter_config.json", "adapter_model.safetensors")


class Listener:
    """A reporter that remembers, and asks to stop when it has heard as many epochs as it is to."""

    def __init__(self, stop_after_epochs: int | None = None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.stop_reason: StopReason | None = None
        self._stop_after = stop_after_epochs

    def event(self, type: str, message: str, *, level: str = "info", **data: object) -> None:
        self.events.append((type, data))
        if len(self.of("epoch_ended")) == self._stop_after:
            self.stop_reason = StopReason.PAUSE

    def of(self, type: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == type]

    def progress(self, stage: str, fraction: float) -> None:
        assert 0 <= fraction <= 1

    def check(self) -> None:
        if self.stop_reason is not None:
            raise Stopped(self.stop_reason)

    def authorise(self) -> None:
        self.check()


class Watcher:
    """What a search tells, and its last state; it asks to stop after so many epochs."""

    def __init__(self, stop_after_epochs: int | None = None) -> None:
        self.state: bytes | None = None
        self.epochs = 0
        self.rates: list[float] = []
        self._stop_after = stop_after_epochs

    def check(self) -> None:
        if self.epochs == self._stop_after:
            raise Stopped(StopReason.PAUSE)

    def save(self, step: int, state: bytes) -> None:
        self.state = state

    def on_epoch(self, *_: object) -> None:
        self.epochs += 1

    def on_slowdown(self, blocks: int, learning_rate: float) -> None:
        self.rates.append(learning_rate)

    def on_end(self, ending: Ending) -> None:
        self.ending = ending

    def on_stop(self, *_: object) -> None: ...

    def on_step(self, *_: object) -> None: ...


class Stand:
    """A store with a data set and an encoder, to run jobs on."""

    def __init__(self, folder: Path) -> None:
        self.model = str(save_wide_model(folder / "model"))
        self.store = ArtifactStore(str(folder / "store"))
        self.settings = Settings(hf_models=(self.model,))
        files, data = FileStore(self.store, "default"), exclusive_or(ROWS)
        self.store.put_new(files.upload_key("file-1"), data)
        files.complete(UploadedFile(id="file-1", filename="a.csv", bytes=len(data), created_at=0))
        ingest(files, "file-1", Limits.from_settings(self.settings))
        self.registry = Registry(self.store)

    def job(self, id: str, attempt: int = 1, **spec: Any) -> Job:
        wanted = {
            "model": f"hf:{self.model}",
            "training_file": "file-1",
            "suffix": "words",
            "strategy": "gradual",
            "hyperparameters": {"n_epochs": 14, "learning_rate_multiplier": 10, "batch_size": 16},
            "early_stopping": {"patience": 14},
        }
        return Job(
            tenant="default", id=id, kind=JobKind.FINE_TUNE, status=JobStatus.RUNNING,
            spec=wanted | spec, attempt=attempt, created_at=time.time(),
        )  # fmt: skip

    def run(self, job: Job, listener: Listener) -> ModelManifest:
        return fine_tune(job, self.store, self.settings, listener)

    def forget(self) -> None:
        """Let nothing that a job has computed serve the next."""
        self.store.delete(*[entry.key for entry in self.store.walk("default/results")])

    def files(self, manifest: ModelManifest) -> dict[str, bytes]:
        return {name: self.registry.file(manifest, name) for name in FILES}


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand(tmp_path_factory.mktemp("gradual"))


@pytest.fixture(scope="module")
def whole(stand: Stand) -> tuple[ModelManifest, Listener]:
    """One job that ran through."""
    listener = Listener()
    return stand.run(stand.job("ftjob-whole"), listener), listener


def test_deltas_ship_when_they_win_by_more_than_the_error(
    whole: tuple[ModelManifest, Listener],
) -> None:
    manifest, listener = whole
    steps = listener.of("unfrozen")
    kept = [step for step in steps if step["kept"]]
    assert kept
    assert all(step["gain"] > step["gain_error"] for step in kept)
    assert all(step in kept for step in steps if step["gain"] > step["gain_error"] + 0.005)
    assert (manifest.kind, manifest.rank, manifest.blocks) == ("low_rank", 8, kept[-1]["blocks"])
    assert manifest.metrics["accuracy"] == pytest.approx(kept[-1]["accuracy"])
    assert manifest.metrics["accuracy"] > 0.9
    # Rows that repeat each other judge together.
    assert manifest.metrics["rows"] == pytest.approx(ROWS // 3, abs=ROWS // 30)
    assert NOVELTY_FILE in manifest.files


def test_every_decision_is_told_when_it_is_made_and_in_the_report(
    stand: Stand, whole: tuple[ModelManifest, Listener]
) -> None:
    """And the report says what it knows of the frozen head only."""
    manifest, listener = whole
    report = Report.model_validate_json(stand.registry.file(manifest, "report.json"))
    kinds = [decision.event for decision in report.decisions]
    steps = len(listener.of("unfrozen"))
    assert kinds == [
        "strength_chosen", "remedy_chosen", "training_planned", *["unfrozen"] * steps,
        "ladder_ended", "temperature_chosen",
    ]  # fmt: skip
    told = [name for name, _ in listener.events]
    assert told.index("strength_chosen") < told.index("training_planned") < told.index("unfrozen")
    for decision in report.decisions:
        assert decision.data in listener.of(decision.event)
    plan = next(each for each in report.decisions if each.event == "training_planned")
    assert plan.data == {
        "rank": 8, "batch_size": 16, "epochs": 14, "learning_rate": pytest.approx(0.03),
        "patience": 14, "asked": ["batch_size", "learning_rate_multiplier", "n_epochs"],
    }  # fmt: skip
    assert {"strength", "candidates", "learning_curve", "label_errors"} <= set(
        report.of_frozen_head
    )
    page = stand.registry.file(manifest, "report.html").decode()
    assert "Of the head on frozen features, not of the tuned model" in page


def test_the_served_model_tells_what_the_frozen_one_cannot(
    stand: Stand, whole: tuple[ModelManifest, Listener]
) -> None:
    """Rows of both, and of a checkpoint, in one batch of the service."""
    plain = stand.run(stand.job("ftjob-plain", strategy="feature_extraction"), Listener())
    checkpoint = Checkpoints(stand.store, "default", "ftjob-whole").list()[-1]
    trunk = Trunk.load(stand.registry, whole[0].trunk, threads=1, max_pixels=1)
    manifests = (plain, whole[0], checkpoint)
    heads = [Head.load(stand.registry, manifest, trunk) for manifest in manifests]
    data = [line.split(",") for line in exclusive_or(ROWS).decode().splitlines()[1:]]
    rows = [trunk.preprocessor.prepare(text) for text, _ in data]  # type: ignore[arg-type]

    async def encode_all() -> list[list[Any]]:
        batcher = Batcher(trunk, "t", 1000, trunk.bank)
        deadline = time.monotonic() + 60
        try:
            return await asyncio.gather(
                *(batcher.encode(rows, deadline, adapter=head.adapter) for head in heads)
            )
        finally:
            await batcher.close()

    right = []
    for head, features in zip(heads, asyncio.run(encode_all()), strict=True):
        answers = head.predict(np.stack(features)).argmax(axis=1)
        labels = [head.manifest.labels[answer] for answer in answers]
        right.append(np.mean([label == row[1] for label, row in zip(labels, data, strict=True)]))
    assert right[0] + 0.02 < right[1]
    assert right[1] > 0.9
    assert right[0] < right[2]


def test_a_job_that_was_paused_ends_with_the_same_bytes(
    stand: Stand, whole: tuple[ModelManifest, Listener]
) -> None:
    """Stopped within the first step, and again within the last training."""
    stand.forget()
    total = len(whole[1].of("epoch_ended"))
    for attempt, epochs in enumerate((3, total - 3 - 2), start=1):
        with pytest.raises(Stopped):
            stand.run(stand.job("ftjob-paused", attempt), Listener(stop_after_epochs=epochs))
    listener = Listener()
    manifest = stand.run(stand.job("ftjob-paused", 3), listener)
    assert listener.of("state_restored")[0]["from_step"] > 0
    assert len(listener.of("epoch_ended")) == 2
    assert stand.files(manifest) == stand.files(whole[0])
    assert manifest.metrics == whole[0].metrics
    assert Checkpoints(stand.store, "default", "ftjob-paused").latest_state() is None


def test_int8_deltas_are_judged_and_served_by_the_trunk_in_int8(stand: Stand) -> None:
    manifest = stand.run(stand.job("ftjob-int8", precision="int8"), Listener())
    trunk = Trunk.load(stand.registry, manifest.trunk, threads=1, max_pixels=1)
    assert (manifest.kind, trunk.manifest.precision) == ("low_rank", "int8")
    head = Head.load(stand.registry, manifest, trunk)
    data = [line.split(",") for line in exclusive_or(ROWS).decode().splitlines()[1:]]
    rows = [trunk.preprocessor.prepare(text) for text, _ in data]  # type: ignore[arg-type]
    features = trunk.encode(rows, trunk.bank.gather([head.adapter]))
    answers = [manifest.labels[n] for n in head.predict(features).argmax(axis=1)]
    right = np.mean([answer == label for answer, (_, label) in zip(answers, data, strict=True)])
    assert right > 0.9
    assert manifest.metrics["accuracy"] == pytest.approx(right, abs=0.08)


class Bare:
    """A search without a job: its source and plan, to change."""

    def __init__(self, stand: Stand) -> None:
        lines = [line.split(",") for line in exclusive_or(96).decode().splitlines()[1:]]
        backbone = backbones.load(f"hf:{stand.model}", (stand.model,))
        texts, targets = [text for text, _ in lines], np.array([int(b == "one") for _, b in lines])
        preprocess = build_preprocessor(
            backbone.preprocess, backbone.tokenizer_json or b"", max_pixels=1
        )
        self.prepared = [preprocess.prepare(text) for text in texts]
        self.features = np.random.default_rng(0).normal(size=(96, backbone.dim)).astype(np.float32)
        slots, objective = slots_of(backbone), Classes(targets, 2)
        self.source = Source(
            2, objective, self.features,
            lambda blocks: DeltaPart(backbone, slots, 2 - blocks, 8, seed=0),
            lambda blocks: views.cache(
                backbone, preprocess, texts, targets, 2 - blocks, views=1, seed=0,
                check=lambda: None,
            ),
        )  # fmt: skip
        chosen = Hyperparameters.model_validate(FEW_EPOCHS)
        self.plan = DEFAULTS[Modality.TEXT].plan(targets, chosen, EarlyStopping(patience=14))

    def run(
        self, watcher: Watcher, state: bytes | None = None, serve: Any = None,
        seconds: float = 600, **changes: Any,
    ) -> Outcome[DeltaPart]:  # fmt: skip
        return Gradual(
            replace(self.source, serve=serve), replace(self.plan, **changes), seed=0,
            deadline=time.monotonic() + seconds, watcher=watcher, state=state,
        ).run()  # fmt: skip


def test_of_few_rows_each_judges_and_a_search_may_stop_in_any_fold(stand: Stand) -> None:
    """Stopped in the first fold, in a later one, with contrast, and at the end."""
    bare, watcher = Bare(stand), Watcher()
    whole = bare.run(watcher, contrast=1.0)
    assert list(whole.held_out) == list(range(96))
    assert [(step.blocks, step.contrast) for step in whole.ladder.steps[1:3]] == [
        (1, 0.0),
        (1, 1.0),
    ]
    assert whole.part is not None

    stops, state = [3, 9, 20], None
    stops.append(watcher.epochs - sum(stops) - 2)
    for epochs in stops:
        stopped = Watcher(epochs)
        with pytest.raises(Stopped):
            bare.run(stopped, state, contrast=1.0)
        state = stopped.state
    resumed = bare.run(Watcher(), state, contrast=1.0)
    untimed = [[step.model_copy(update={"seconds": 0}) for step in each.ladder.steps]
               for each in (resumed, whole)]  # fmt: skip
    assert untimed[0] == untimed[1]
    assert np.array_equal(resumed.outputs, whole.outputs)
    assert np.array_equal(resumed.distances, whole.distances)
    assert resumed.part is not None
    for name, delta in whole.part.adapter().deltas.items():
        assert np.array_equal(resumed.part.adapter().deltas[name].b, delta.b)


def test_a_search_without_time_says_that_nothing_was_tried(stand: Stand) -> None:
    ladder = Bare(stand).run(Watcher(), seconds=0).ladder
    assert ladder.ending is not None
    assert (len(ladder.steps), ladder.ending.reason) == (1, "time")
    assert "No step was tried" in ladder.why_frozen


def test_a_ladder_that_has_ended_is_not_climbed_on_when_resumed(stand: Stand) -> None:
    """It ended for want of room, and resumes where there is room, or where there is none at all."""
    bare, room = Bare(stand), 1
    rows = bare.source.rows

    def within(blocks: int) -> Any:
        if blocks > room:
            raise NoSpace("too large")
        return rows(blocks)

    bare.source = replace(bare.source, rows=within)
    trainings = 3
    stopped = Watcher(trainings * FEW_EPOCHS["n_epochs"] + 1)
    with pytest.raises(Stopped):
        bare.run(stopped)
    assert stopped.ending == Ending(reason="space", why="too large")
    room = 0
    with pytest.raises(NoSpace):
        bare.run(Watcher(), stopped.state)
    room = 2
    outcome = bare.run(Watcher(), stopped.state)
    assert [step.blocks for step in outcome.ladder.steps] == [0, 1]
    assert outcome.ladder.ending == stopped.ending
    assert outcome.part is not None


def test_activations_come_from_the_scratch_disk_as_they_went(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of them, and a full disk has a name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bare = Bare(stand)
    rows = bare.source.rows(1)
    backbone = backbones.load(f"hf:{stand.model}", (stand.model,))
    for number, prepared in enumerate(bare.prepared):
        [hidden] = capture(backbone, 1, [prepared])
        assert rows.length(number) == prepared.cost
        assert torch.allclose(rows.plain(number), hidden, atol=1e-5)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(views, "TemporaryFile", partial(open, "/dev/full", "wb"))
    with pytest.raises(NoSpace, match="scratch disk"):
        bare.source.rows(1)


def test_each_share_of_the_deltas_is_judged_as_it_is_served(
    stand: Stand, whole: tuple[ModelManifest, Listener]
) -> None:
    bare = Bare(stand)
    tasks = Tasks(bare.source, bare.plan)
    rows = tasks.rows(2)
    task = tasks.make(Rung(2), rows, np.arange(96))
    recipe = Recipe(epochs=2, learning_rate=bare.plan.learning_rate)
    Trainer(task, recipe, seed=0).run(check=lambda: None)
    trunk = Trunk.load(stand.registry, whole[0].trunk, threads=1, max_pixels=1)
    judged = tasks.features(task, rows)
    for share, features in zip(SHARES, judged, strict=True):
        task.part.set_share(share)
        served = trunk.encode(bare.prepared, feed(task.part.adapter(), trunk.manifest.slots))
        assert np.abs(served - features).max() < 1e-3
    assert np.abs(judged[0] - judged[1]).max() > 0.1


def test_deltas_that_only_torch_can_use_do_not_ship(stand: Stand) -> None:
    """Where the trunk gives other features than torch, its are those that are judged."""
    bare = Bare(stand)
    outcome = bare.run(Watcher(), serve=lambda _: bare.features.copy())
    assert len(outcome.ladder.steps) > 1
    assert not any(step.kept for step in outcome.ladder.steps[1:])


def test_a_rate_at_which_training_diverges_is_lowered(stand: Stand) -> None:
    watcher = Watcher()
    outcome = Bare(stand).run(watcher, learning_rate=900.0, slowdowns=2)
    assert watcher.rates == [300.0, 100.0]
    assert {step.learning_rate for step in outcome.ladder.steps[1:]} == {100.0}


def test_a_remedy_for_imbalance_is_in_what_is_tuned_as_the_report_says(stand: Stand) -> None:
    """One of two words, and not both, is what few rows have, by whether a third word is there."""
    numbers = random.Random(1)
    others = ["where", "is", "my", "the", "lost", "transfer", "failed", "help"]
    lines = ["text,label"]
    for row in range(ROWS):
        is_rare, turn = row % 6 == 0, row // 6 if row % 6 == 0 else row
        first, third = turn % 2, turn // 2 % 2
        second = 1 - first if is_rare else first
        words = numbers.sample(others, 5) + ["card"] * first + ["money"] * second + ["pin"] * third
        numbers.shuffle(words)
        lines.append(f"{' '.join(words)},{('one', 'pin')[third] if is_rare else 'other'}")
    files, data = FileStore(stand.store, "default"), "\n".join(lines).encode()
    stand.store.put_new(files.upload_key("file-rare"), data)
    files.complete(UploadedFile(id="file-rare", filename="a.csv", bytes=1, created_at=0))
    ingest(files, "file-rare", Limits.from_settings(stand.settings))
    few = {"n_epochs": 4, "learning_rate_multiplier": 10, "batch_size": 16}
    listener = Listener()
    job = stand.job("ftjob-rare", training_file="file-rare", suffix="rare", hyperparameters=few)
    manifest = stand.run(job, listener)
    report = Report.model_validate_json(stand.registry.file(manifest, "report.json"))
    assert manifest.kind == "low_rank"
    assert manifest.training["imbalance_remedy"] == report.remedy == "balanced_weights"
    chosen = {decision.what: decision.chosen for decision in report.decisions}
    assert chosen["Class imbalance"] == "balanced weights"
    checkpoint = Checkpoints(stand.store, "default", "ftjob-rare").list()[-1]
    assert checkpoint.training["imbalance_remedy"] == "balanced_weights"
    assert manifest.metrics["macro_f1"] > max(each.macro_f1 for each in report.remedies) + 0.1


def test_the_same_job_gives_the_same_bytes(
    stand: Stand, whole: tuple[ModelManifest, Listener]
) -> None:
    stand.forget()
    again = stand.run(stand.job("ftjob-again"), listener := Listener())
    assert not listener.of("recalled")
    assert stand.files(again) == stand.files(whole[0])


def test_auto_compares_the_backbones_that_read_the_data(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is not installed here, and one cannot be had in int8."""
    absent = replace(BACKBONES["minilm"], package="weights-that-nobody-has")
    monkeypatch.setitem(BACKBONES, "minilm", absent)
    listener = Listener()
    job = stand.job("ftjob-open", strategy="feature_extraction", model="auto", precision="int8")
    manifest = stand.run(job, listener)
    [backbone] = listener.of("backbone_chosen")
    candidates = {each["model"]: each for each in backbone["candidates"]}
    assert manifest.backbone == backbone["model"]
    assert set(candidates) == {"wordllama", "minilm", f"hf:{stand.model}"}
    assert "weights-that-nobody-has is not installed" in candidates["minilm"]["problem"]
    assert "no linear layers" in candidates["wordllama"]["problem"]
    assert candidates[manifest.backbone]["accuracy"] > 0
    assert '"what": "Backbone"' in stand.registry.file(manifest, "report.json").decode()


def test_a_backbone_without_layers_for_deltas_keeps_the_frozen_head(stand: Stand) -> None:
    listener = Listener()
    manifest = stand.run(stand.job("ftjob-static", model="wordllama"), listener)
    assert len(listener.of("frozen_head_kept")) == 1
    assert (manifest.backbone, manifest.kind, manifest.dim) == ("wordllama", "linear", 256)


def test_auto_tunes_where_that_can_pay_and_says_why(stand: Stand) -> None:
    """On the same data: with the time for it, and without."""
    listener = Listener()
    few = {"n_epochs": 1, "learning_rate_multiplier": 0.001, "batch_size": 16}
    manifest = stand.run(stand.job("ftjob-auto", strategy="auto", hyperparameters=few), listener)
    [choice] = listener.of("strategy_chosen")
    assert (choice["strategy"], choice["rows_per_class"]) == ("gradual", ROWS / 2)
    assert choice["seconds_needed"] < choice["seconds_left"]
    assert listener.of("unfrozen")
    assert '"what": "Strategy"' in stand.registry.file(manifest, "report.json").decode()

    stand.forget()
    hurried = Listener()
    manifest = stand.run(stand.job("ftjob-hurried", strategy="auto", max_seconds=1), hurried)
    assert hurried.of("strategy_chosen")[0]["strategy"] == "feature_extraction"
    assert not hurried.of("unfrozen")
    assert manifest.kind == "linear"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a layer of any copy of the encoder has run."""
    counted: Counter[str] = Counter()
    forward = BertLayer.forward

    def count(self: BertLayer, *args: Any, **kwargs: Any) -> Any:
        counted["layer"] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertLayer, "forward", count)
    return counted


def test_a_second_job_on_the_same_data_searches_and_computes_nothing_anew(
    stand: Stand, runs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `gradual`, and by `auto`, which need not measure if there is the time."""
    few = {"n_epochs": 2, "learning_rate_multiplier": 10, "batch_size": 16}
    encoded: list[int] = []
    encode = Trunk.encode

    def count(self: Trunk, rows: Any, deltas: Any = None) -> Any:
        encoded.append(len(rows))
        return encode(self, rows, deltas)

    monkeypatch.setattr(Trunk, "encode", count)
    monkeypatch.setattr(strategies, "row_seconds", lambda *_: 0.0)
    first = stand.run(stand.job("ftjob-first", hyperparameters=few), before := Listener())
    assert before.of("unfrozen")
    assert sum(encoded) > ROWS
    monkeypatch.setattr(strategies, "row_seconds", None)
    for strategy in ("gradual", "auto"):
        encoded.clear()
        runs.clear()
        job = stand.job(f"ftjob-{strategy}-again", strategy=strategy, hyperparameters=few)
        again = stand.run(job, after := Listener())
        assert "search" in [each["what"] for each in after.of("recalled")]
        assert not after.of("epoch_ended")
        # The trunk's golden rows alone, as it is loaded and to check the exported adapter.
        golden = len(Trunk.load(stand.registry, again.trunk, threads=1, max_pixels=1).golden_rows)
        assert set(encoded) == {golden}
        assert runs.total() <= 2 * golden
        assert stand.files(again) == stand.files(first)
        assert again.metrics == first.metrics
        for name in ("unfrozen", "training_planned", "temperature_chosen"):
            assert after.of(name) == before.of(name)


def test_a_search_that_the_clock_cut_short_is_not_kept(stand: Stand) -> None:
    few = {"n_epochs": 2, "learning_rate_multiplier": 7, "batch_size": 16}
    hurried = {"hyperparameters": few, "max_seconds": 1}
    for job in ("ftjob-late", "ftjob-late-again"):
        listener = Listener()
        stand.run(stand.job(job, **hurried), listener)
        assert "search" not in [each["what"] for each in listener.of("recalled")]


def test_frozen_blocks_never_run_in_an_epoch(stand: Stand, runs: Counter[str]) -> None:
    """Between the first and the last epoch of a step on one of two blocks, one runs each time."""
    marks: list[int] = []

    class Counting(Listener):
        def event(self, type: str, message: str, **data: object) -> None:
            if type == "epoch_ended" and data["blocks"] == 1:
                marks.append(runs.total())
            super().event(type, message, **data)

    stand.forget()
    stand.run(stand.job("ftjob-counted"), Counting())
    # 200 rows in batches of 16, and 100 held-out rows in two.
    assert marks[1] - marks[0] == math.ceil(200 / 16) + 2


def test_a_step_without_gain_leaves_the_frozen_head(stand: Stand) -> None:
    listener = Listener()
    few = {"n_epochs": 1, "learning_rate_multiplier": 0.001}
    manifest = stand.run(stand.job("ftjob-frozen", hyperparameters=few), listener)
    assert [step["kept"] for step in listener.of("unfrozen")] == [False, False]
    assert listener.of("frozen_head_kept")
    assert (manifest.kind, manifest.rank) == ("linear", 0)
    plain = stand.run(stand.job("ftjob-linear", strategy="feature_extraction"), Listener())
    assert manifest.files["head.onnx"] == plain.files["head.onnx"]


def test_a_low_rank_head_is_not_loaded_without_its_trunk_or_with_other_deltas(
    stand: Stand, whole: tuple[ModelManifest, Listener], tmp_path: Path
) -> None:
    from core.adapters import WEIGHTS_FILE, read_adapter, write_adapter
    from core.errors import Conflict

    manifest = whole[0]
    with pytest.raises(Conflict, match="trunk"):
        Head.load(stand.registry, manifest)
    trunk = Trunk.load(stand.registry, manifest.trunk, threads=1, max_pixels=1)
    files = stand.files(manifest)
    slots = trunk.manifest.slots
    adapter = read_adapter(files["adapter_config.json"], files[WEIGHTS_FILE], slots)
    for delta in adapter.deltas.values():
        delta.b[:] += 1.0
    files[WEIGHTS_FILE] = write_adapter(adapter, slots, "x")[WEIGHTS_FILE]
    registry = Registry(ArtifactStore(str(tmp_path)))
    changed = registry.publish(manifest.model_copy(update={"files": {}}), files)
    with pytest.raises(Conflict, match="golden"):
        Head.load(registry, changed, trunk)


@pytest.mark.parametrize("kind", [*TEXT_MODELS, *IMAGE_MODELS])
def test_every_kind_of_encoder_can_be_cut(kind: str, tmp_path: Path) -> None:
    """`Upper` compares itself with the whole encoder, and raises if they differ."""
    save = save_text_model if kind in TEXT_MODELS else save_image_model
    folder = str(save(kind, tmp_path / "model"))
    backbone = backbones.load(f"hf:{folder}", (folder,))
    rows = next(parity.probes(backbone))
    expected = backbone.module(*parity.torch_inputs(backbone, rows)).detach()
    for cut in (0, 1):
        activations = capture(backbone, cut, rows)
        features = Upper(backbone, cut)(Batch.of(activations, backbone.modality)).detach()
        assert torch.allclose(features, expected, atol=1e-5)


def test_packaged_encoders_can_be_cut_anywhere() -> None:
    cuts_of = {"minilm": (0, 3, 5), "mobilenet-v2": (0, 8, 16), "efficientnet-lite0": (0, 8, 15)}
    for model, cuts in cuts_of.items():
        backbone = backbones.load(model, ())
        for cut in cuts:
            Upper(backbone, cut)
