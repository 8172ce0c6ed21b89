"""Jobs with `gradual` that are interrupted: they go on where they were, and end the same.

Through the official client, on an encoder of two blocks that trains in seconds and whose rows no
frozen head can tell apart, so that there are checkpoints.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from shutil import rmtree
from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.e2e.live_stack import LiveStack, start_stack, stop_stack
from tests.integration.hf_models import exclusive_or, save_wide_model
from tests.waiting import eventually

ROWS = 96
NAME = "words"
HYPERPARAMETERS = {"n_epochs": 16, "learning_rate_multiplier": 10, "batch_size": 8}
PROBES = ["where is my card", "card lost money", "help me"]


@dataclass(frozen=True)
class Stand:
    """A stack of one's own, to break, a data set, and a job that ran through undisturbed."""

    stack: LiveStack
    model: str
    file: str
    whole: FineTuningJob

    def train(self, **extra: Any) -> str:
        """Start a job that does not find what the one before has come to."""
        rmtree(self.stack.data / "store/default/results", ignore_errors=True)
        return train(self.stack, self.model, self.file, **extra)

    def events(self, job_id: str, type: str) -> list[dict[str, Any]]:
        """The data of a job's events of a type, newest first."""
        listed = self.stack.openai.fine_tuning.jobs.list_events(job_id, limit=100)
        events: list[dict[str, Any]] = [event.to_dict() for event in listed]
        return [event["data"] for event in events if event["event"] == type]

    def trains(self, job_id: str, epochs: int = 3) -> None:
        """Wait until a job is some epochs into its training."""
        told = f"{job_id} trains"
        eventually(lambda: len(self.events(job_id, "epoch_ended")) >= epochs, 60, told)

    def checkpointed(self, job_id: str) -> None:
        """Wait until a job has a checkpoint."""
        listed = self.stack.openai.fine_tuning.jobs.checkpoints.list
        eventually(lambda: bool(listed(job_id).data), 60, f"{job_id} has a checkpoint")

    def ends_like_the_whole(self, job_id: str) -> None:
        """Wait for its end, and compare metrics and the bytes of head and adapter."""
        job = self.stack.finished(job_id)
        assert job.status == "succeeded", job.error
        assert metrics(job) == metrics(self.whole)
        assert head(self.stack, job) == head(self.stack, self.whole)


def train(stack: LiveStack, model: str, file: str, **extra: Any) -> str:
    job = stack.openai.fine_tuning.jobs.create(
        model=model, training_file=file, suffix=NAME,
        method={"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},  # type: ignore[typeddict-item]
        extra_body={"strategy": "gradual", "early_stopping": {"patience": 16}, **extra},
    )  # fmt: skip
    return job.id


def metrics(job: FineTuningJob) -> dict[str, float]:
    found: dict[str, float] = job.to_dict()["metrics"]  # type: ignore[assignment]
    return found


def head(stack: LiveStack, job: FineTuningJob) -> dict[str, bytes]:
    assert job.fine_tuned_model is not None
    name, number = job.fine_tuned_model.split("@")
    folder = stack.data / "store/default/models" / name / "versions" / number
    files = ("head.onnx", "adapter_model.safetensors", "golden.safetensors")
    return {file: (folder / file).read_bytes() for file in files}


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("gradual")
    encoder = str(save_wide_model(folder / "model"))
    stack = start_stack(
        folder, GRAFT_LEASE_SECONDS="2", GRAFT_HF_MODELS=json.dumps([encoder]), OMP_NUM_THREADS="1"
    )
    model, file = f"hf:{encoder}", stack.upload("words.csv", exclusive_or(ROWS)).id
    whole = stack.finished(train(stack, model, file))
    assert whole.status == "succeeded", whole.error
    yield Stand(stack, model, file, whole)
    stop_stack(stack)


def test_a_paused_job_lets_another_run_and_ends_the_same(stand: Stand) -> None:
    jobs = stand.stack.openai.fine_tuning.jobs
    job_id = stand.train()
    stand.trains(job_id)
    jobs.pause(job_id)
    eventually(lambda: stand.stack.job(job_id).status == "paused", 20, "it is paused")
    (saved,) = stand.events(job_id, "state_saved")

    other = stand.train(strategy="feature_extraction")
    assert stand.stack.finished(other).status == "succeeded"
    assert stand.stack.job(job_id).status == "paused"

    jobs.resume(job_id)
    stand.ends_like_the_whole(job_id)
    (restored,) = stand.events(job_id, "state_restored")
    assert restored["from_step"] == saved["step"] > 0


def test_a_worker_told_to_stop_saves_the_state(stand: Stand) -> None:
    job_id = stand.train()
    stand.trains(job_id)
    (worker,) = stand.stack.pids("training.worker")
    os.kill(worker, signal.SIGTERM)
    stand.ends_like_the_whole(job_id)
    (restarted,) = stand.events(job_id, "job_restarted")
    (restored,) = stand.events(job_id, "state_restored")
    assert restarted["reason"] == "worker_stopped"
    assert restarted["from_step"] == restored["from_step"] > 0


def test_a_killed_worker_s_job_goes_on_from_the_last_epoch(stand: Stand) -> None:
    job_id = stand.train()
    stand.trains(job_id)
    (worker,) = stand.stack.pids("training.worker")
    os.kill(worker, signal.SIGKILL)
    stand.ends_like_the_whole(job_id)
    (restarted,) = stand.events(job_id, "job_restarted")
    (restored,) = stand.events(job_id, "state_restored")
    assert restarted["reason"] == "worker_lost"
    # An epoch may have been saved and not told of.
    assert 0 < restarted["from_step"] <= restored["from_step"]


def test_a_checkpoint_predicts_while_its_job_trains_and_the_best_can_be_kept(stand: Stand) -> None:
    jobs = stand.stack.openai.fine_tuning.jobs
    dropped, kept = stand.train(seed=1), stand.train(seed=2)
    for job_id in (dropped, kept):
        stand.checkpointed(job_id)
        listed = jobs.checkpoints.list(job_id).data
        for checkpoint in listed:
            answer = stand.stack.predict(checkpoint.fine_tuned_model_checkpoint, PROBES)
            assert answer["model"] == checkpoint.fine_tuned_model_checkpoint
            assert {row["label"] for row in answer["predictions"]} <= {"one", "other"}
        jobs.cancel(job_id, extra_body={"keep_best": job_id == kept})
        job = stand.stack.finished(job_id)
        assert job.status == "cancelled", job.error
        references = [each.fine_tuned_model_checkpoint for each in listed]
        if job_id == kept:
            (best,) = jobs.checkpoints.list(job_id).data
            assert best.fine_tuned_model_checkpoint in references
            stand.stack.predict(best.fine_tuned_model_checkpoint, PROBES)
        else:
            assert jobs.checkpoints.list(job_id).data == []


def test_a_whole_tuned_backbone_outlives_its_worker_is_served_and_goes_with_its_model(
    stand: Stand,
) -> None:
    """Its own trunk answers predictions and embeddings; the one that models share is as it was."""
    stack, embed = stand.stack, stand.stack.openai.embeddings.create
    before = embed(model=stand.model, input=PROBES).data[0].embedding
    job_id = stand.train(strategy="full", suffix="whole")
    stand.trains(job_id)
    (worker,) = stack.pids("training.worker")
    os.kill(worker, signal.SIGKILL)
    job = stack.finished(job_id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == "whole@1"
    assert stand.events(job_id, "backbone_tuned")
    assert stand.events(job_id, "job_restarted")

    stack.served("whole")
    rows = [line.split(",") for line in exclusive_or(ROWS).decode().splitlines()[1:]]
    answers = stack.predict("whole", [text for text, _ in rows])["predictions"]
    right = [answer["label"] == label for answer, (_, label) in zip(answers, rows, strict=True)]
    assert sum(right) > 0.85 * ROWS
    assert embed(model="whole", input=PROBES).data[0].embedding != before
    assert embed(model=stand.model, input=PROBES).data[0].embedding == before

    folder = stack.data / "store/default/models/whole/versions/1"
    assert (folder / "own-trunk.onnx").is_file()
    stack.openai.models.delete("whole")
    assert [path.name for path in folder.iterdir()] == ["deleted.json"]
    assert stack.http.post("/v1/predict", json={"model": "whole@1", "inputs": ["a"]}).is_error
